"""GDMD: a reward judges where each distillation gradient would take its sample, and so weights it.

Source: GDMD (2604.19009), Algorithm 1; ``docs/methods/gdmd.md`` says which choices are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Backward, Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, NoisyLatents
from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.base import Logs, State, Update, weighted_sum
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.record import JudgedTargets
from gdmd_lightning.methods.reward_terms import Policy, policy_noise, policy_term
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.objectives.policy import gradient_weight, optimality
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import NonNegative, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import RoleSpec


@dataclass(frozen=True)
class FoundTargets:
    """The implicit targets of an update before they are judged, ``M`` for each of ``B`` samples.

    Args:
        x: Samples, ``[B, C, H, W]``, detached.
        targets: ``[B, M, C, H, W]``.
        n: Normalizers, ``[B, M]``.
        gradient: Mean magnitude of each normalized distillation gradient, ``[B, M]``.
        renoise_sigma: ``[B, M]``.
    """

    x: Tensor
    targets: Tensor
    n: Tensor
    gradient: Tensor
    renoise_sigma: Tensor


@ranged
class GDMD(MatchingModule):
    """Distribution matching whose gradients are judged by a reward.

    Args:
        family: The teacher's pipeline.
        reward: Judges decoded targets.
        targets: The group of implicit targets of a state.
        advantages: How rewards become advantages.
        policy: How advantages become an update.
        lambda_policy: Weight of the policy term; distillation has weight 1.
        matching_module: Arguments of :class:`MatchingModule`.
    """

    judge: Judge
    keeps_record = True

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        targets: TargetGroup = TargetGroup(),
        advantages: TargetAdvantages = TargetAdvantages(),
        policy: Policy = Policy(),
        lambda_policy: NonNegative = 1.0,
        **matching_module: Any,
    ) -> None:
        super().__init__(family, **matching_module)
        self.targets, self.advantages, self.policy, self.lambda_policy = targets, advantages, policy, lambda_policy
        self.judge = self.judge_with(reward)
        self.snapshots = tuple(f"fake_score@{slot}" for slot in range(1, targets.past + 1))

    def check_batch(self, batch_size: int, group_size: int) -> None:
        if self.lambda_policy:  # 0 switches the reward's effect off
            self.advantages.check(batch_size, group_size, self.targets.size)

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The roles of distribution matching, the old policy, and snapshots of the fake score."""
        past = (RoleSpec(name, snapshot_of="fake_score") for name in self.snapshots)
        if self.policy.form == "weighted":
            return (*super().role_specs(), *past)
        return (*super().role_specs(), RoleSpec("old", average_of="generator", decay=self.policy.old_decay), *past)

    def no_overlap(self) -> str | None:
        if self.matching.fake_score_samples == "fresh":
            return "with fresh samples the fake score learns from the generator after its step"
        return None

    def update(self, batch: Batch, learn: Learn) -> Update:
        """Judge a group of targets for each sample; step the generator, then the fake score."""
        self.judge.check(batch.prompts)
        self.keep_snapshot(self.snapshots, self.targets.snapshot_every)
        state = self.rollout_state(batch)
        if self.speed.overlap_reward:
            return self._update_meanwhile(batch, state, learn)
        with learn("generator") as backward:
            # Whole groups are judged: with several micro-batches, first compute samples without gradient.
            whole = len(list(self.micro_batches(len(batch)))) == 1
            with torch.set_grad_enabled(whole):
                x = self.student_x0(state.latents)
            found = self._find_targets(x, state, batch)
            judged = self._judged(found, state, batch, self.judge.each(*self._to_judge(found, batch)))
            logs = self._learn_generator(backward, state, judged, found.n, x if whole else None)
        return Update(logs | judged.logs() | self.train_fake_score(batch, state, judged.x, learn), record=judged)

    def _update_meanwhile(self, batch: Batch, state: State, learn: Learn) -> Update:
        """The same steps in another order: the fake score learns while the targets that it gave are being judged."""
        with torch.no_grad():
            x = self.student_x0(state.latents)
        found = self._find_targets(x, state, batch)
        with self.judge.ahead(*self._to_judge(found, batch)) as answer:
            fake_score_logs = self.train_fake_score(batch, state, x, learn)
            judged = self._judged(found, state, batch, answer())
        with learn("generator") as backward:
            logs = self._learn_generator(backward, state, judged, found.n, None)
        return Update(logs | judged.logs() | fake_score_logs, record=judged)

    def _find_targets(self, x: Tensor, state: State, batch: Batch) -> FoundTargets:
        """The group of targets of each sample ``x``, ``[B, C, H, W]``."""
        size = self.targets.size
        draw = self.draw_renoise(state, size, share_sigma=self.targets.over == "snapshot")
        match = self.match(x, batch.conditioning, draw, ("fake_score", *self.snapshots))
        of_samples = (len(x), size)
        targets, n = match.target.unflatten(0, of_samples), match.n.unflatten(0, of_samples)
        return FoundTargets(x.detach(), targets, n, match.gradient.unflatten(0, of_samples), draw.sigma)

    def _to_judge(self, found: FoundTargets, batch: Batch) -> tuple[Tensor, tuple[Prompt, ...]]:
        """Latents and prompts to score."""
        return self.advantages.to_judge(found.targets, found.x, batch)

    def _judged(self, found: FoundTargets, state: State, batch: Batch, each: Tensor) -> JudgedTargets:
        """The targets with their advantages; ``each`` are the scores of :meth:`_to_judge`, ``[rows, R]``."""
        size = self.targets.size
        group = self.advantages.judged(self.judge, each, size, batch)
        return JudgedTargets(
            prompts=batch.prompts,
            x=found.x,
            targets=found.targets,
            sigma=state.latents.sigma,
            renoise_sigma=found.renoise_sigma,
            snapshot=torch.arange(size) % (1 + len(self.snapshots)),
            gradient=found.gradient,
            rewards=group.rewards,
            sample_reward=group.sample_reward,
            advantages=group.advantages,
            without_spread=self.advantages.without_spread(group.advantages, batch.groups),
            optimality=optimality(group.advantages, self.advantages.clip),
            lambda_policy=self.lambda_policy,
        )

    def _learn_generator(
        self, backward: Backward, state: State, judged: JudgedTargets, n: Tensor, x: Tensor | None
    ) -> Logs:
        """Losses of all micro-batches and their gradients.

        Args:
            backward: The generator's.
            state: Where the generator's step starts, ``B`` rows.
            judged: Targets and what the reward says about them.
            n: Normalizers, ``[B, M]``.
            x: Samples with gradient, ``[B, C, H, W]``; ``None`` to compute them in micro-batches.
        """
        eps = policy_noise(self.policy, judged.targets, self.stream("policy"))
        logs: Logs = {}
        for rows, share in self.micro_batches(len(state.latents)):
            latents = state.latents.select(rows)
            part = self.student_x0(latents) if x is None else x
            losses = self._loss(part, latents, judged.targets[rows], n[rows], judged.optimality[rows], eps[rows])
            backward(share * losses["loss"])
            weighted_sum(logs, share, **losses)
        return logs

    def _loss(self, x: Tensor, latents: NoisyLatents, y: Tensor, n: Tensor, o: Tensor, eps: Tensor) -> Logs:
        """Distillation plus the policy term, averaged over targets ``[B, M, C, H, W]``, and the two apart."""
        each = x.repeat_interleave(y.shape[1], dim=0)
        y, n, o = y.flatten(0, 1), n.flatten(), o.flatten()
        if self.policy.form == "weighted":
            return {"loss": dm_loss(each, y, n, gradient_weight(o, 2 * self.lambda_policy))}
        dm, policy = dm_loss(each, y, n), policy_term(self.roles, self.policy, x, latents, y, n, o, eps.flatten(0, 1))
        return {"loss": dm + self.lambda_policy * policy, "dm_loss": dm, "policy_loss": policy}
