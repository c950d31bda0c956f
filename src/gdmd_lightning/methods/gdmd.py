"""GDMD: a reward judges where each distillation gradient would take its sample, and so weights it.

Source: GDMD (2604.19009), Algorithm 1; ``docs/methods/gdmd.md`` says which choices are ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, NoisyLatents
from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.base import Logs, State, Update, weighted_sum
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.record import JudgedTargets
from gdmd_lightning.methods.reward_terms import Policy, policy_noise, policy_term
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.objectives.policy import gradient_weight, optimality
from gdmd_lightning.ranges import NonNegative, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import RoleSpec


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

    def update(self, batch: Batch, learn: Learn) -> Update:
        """Judge a group of targets for each sample; step the generator, then the fake score."""
        self.judge.check(batch.prompts)
        self.keep_snapshot(self.snapshots, self.targets.snapshot_every)
        state = self.rollout_state(batch)
        parts = list(self.micro_batches(len(batch)))
        loss_logs: Logs = {}
        with learn("generator") as backward:
            # Whole groups are judged: with several micro-batches, first compute samples without gradient.
            with torch.set_grad_enabled(len(parts) == 1):
                x = self.student_x0(state.latents)
            judged, n = self._judge_targets(x, state, batch)
            eps = policy_noise(self.policy, judged.targets, self.stream("policy"))
            for rows, share in parts:
                latents = state.latents.select(rows)
                part = x if len(parts) == 1 else self.student_x0(latents)
                losses = self._loss(part, latents, judged.targets[rows], n[rows], judged.optimality[rows], eps[rows])
                backward(share * losses["loss"])
                weighted_sum(loss_logs, share, **losses)
        return Update(loss_logs | judged.logs() | self.train_fake_score(batch, state, judged.x, learn), record=judged)

    def _judge_targets(self, x: Tensor, state: State, batch: Batch) -> tuple[JudgedTargets, Tensor]:
        """The group of targets of each sample with its advantages, and the normalizers ``[B, M]``."""
        size, over = self.targets.size, self.targets.over
        scores = ("fake_score", *self.snapshots)
        draw = self.draw_renoise(state, size, share_sigma=over == "snapshot")
        match = self.match(x, batch.conditioning, draw, scores)
        targets = match.target.unflatten(0, (len(x), size))
        group = self.advantages.judge(self.judge, targets, x.detach(), batch)
        judged = JudgedTargets(
            prompts=batch.prompts,
            x=x.detach(),
            targets=targets,
            sigma=state.latents.sigma,
            renoise_sigma=draw.sigma,
            snapshot=torch.arange(size) % len(scores),
            gradient=match.gradient.unflatten(0, (len(x), size)),
            rewards=group.rewards,
            sample_reward=group.sample_reward,
            advantages=group.advantages,
            without_spread=self.advantages.without_spread(group.advantages, batch.groups),
            optimality=optimality(group.advantages, self.advantages.clip),
            lambda_policy=self.lambda_policy,
        )
        return judged, match.n.unflatten(0, (len(x), size))

    def _loss(self, x: Tensor, latents: NoisyLatents, y: Tensor, n: Tensor, o: Tensor, eps: Tensor) -> Logs:
        """Distillation plus the policy term, averaged over targets ``[B, M, C, H, W]``, and the two apart."""
        each = x.repeat_interleave(y.shape[1], dim=0)
        y, n, o = y.flatten(0, 1), n.flatten(), o.flatten()
        if self.policy.form == "weighted":
            return {"loss": dm_loss(each, y, n, gradient_weight(o, 2 * self.lambda_policy))}
        dm, policy = dm_loss(each, y, n), policy_term(self.roles, self.policy, x, latents, y, n, o, eps.flatten(0, 1))
        return {"loss": dm + self.lambda_policy * policy, "dm_loss": dm, "policy_loss": policy}
