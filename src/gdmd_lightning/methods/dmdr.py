"""DMDR: distribution matching and a reward on the generator's own samples, in one step.

The matching term keeps the generator near the teacher, as a KL term would. Before that, a cold start matches easier
targets: an estimator between teacher and fake score (DynaDG), at higher levels (DynaRS).

Source: DMDR (2511.13649); its code has the ``refl`` form only.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Backward, Learn
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, NoisyLatents
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.base import Update, weighted_sum
from gdmd_lightning.methods.cold_start import ColdStart
from gdmd_lightning.methods.grpo_terms import GRPO, grpo_term
from gdmd_lightning.methods.matching import MatchingModule, RenoiseDraw
from gdmd_lightning.methods.nft_terms import NFT, nft_term, renoised_samples
from gdmd_lightning.methods.reward_terms import refl_loss, require_differentiable
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.objectives.policy import optimality
from gdmd_lightning.ranges import Finite, NonNegative, ranged
from gdmd_lightning.ranks import std
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import RoleSpec
from gdmd_lightning.schedules import RenoiseDistribution


@ranged
class DMDR(MatchingModule):
    """Distribution matching plus a reward term.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        reward_weight: Weight of the reward term, at least 0; distribution matching has weight 1.
        joint: The reward term: ``refl``: the reward's own gradient on the samples that are matched; ``grpo`` or
            ``nft``: policy terms on full rollouts.
        margin: Samples with a reward of at least this much give no gradient; null for no limit. For ``refl``.
        grpo: Rollouts and the clipped ratio, for ``grpo``.
        nft: The velocity policies, for ``nft``.
        sample_advantages: How rewards become advantages, for ``grpo`` and ``nft``.
        cold_start: The first updates; null for none.
        matching_module: Arguments of :class:`MatchingModule`.

    Raises:
        UserError: If a value is out of range, does not fit ``joint``, or has no meaning with full copies.
    """

    judge: Judge

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        reward_weight: NonNegative = 0.05,
        joint: Literal["refl", "grpo", "nft"] = "refl",
        margin: Finite | None = None,
        grpo: GRPO = GRPO(),
        nft: NFT = NFT(),
        sample_advantages: SampleAdvantages = SampleAdvantages(),
        cold_start: ColdStart | None = None,
        **matching_module: Any,
    ) -> None:
        super().__init__(family, **matching_module)
        self.reward_weight, self.joint, self.margin = reward_weight, joint, margin
        self.grpo, self.nft = grpo, nft
        self.sample_advantages, self.cold_start = sample_advantages, cold_start
        self.needs_groups = joint != "refl" and reward_weight > 0
        self._check_settings(reward)
        self.judge = self.judge_with(reward)

    def _check_settings(self, reward: Reward) -> None:
        own: dict[str, tuple[str, ...]] = {
            "refl": ("margin",),
            "grpo": ("grpo", "sample_advantages"),
            "nft": ("nft", "sample_advantages"),
        }
        defaults = {"margin": None, "grpo": GRPO(), "nft": NFT(), "sample_advantages": SampleAdvantages()}
        for name, default in defaults.items():
            if name not in own[self.joint] and getattr(self, name) != default:
                raise UserError(f"set, but joint is {self.joint!r}", where=f"model.{name}", remedy="remove one of them")
        if self.joint == "refl":
            require_differentiable(reward, self.memory)
        elif self.joint == "grpo":
            self.grpo.check_steps(self.steps)
        else:
            self.nft.check_steps(self.steps)
        if self.cold_start is not None:
            self.cold_start.check_roles(self.lora, self.matching)

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The roles of distribution matching, and the old policy for ``nft``."""
        old = (RoleSpec("old", snapshot_of="generator"),) if self.joint == "nft" else ()
        return (*super().role_specs(), *old)

    @property
    def fullest_update(self) -> int:
        return 0 if self.cold_start is None else self.cold_start.updates

    # The cold start.

    def renoise_law(self, distribution: RenoiseDistribution) -> RenoiseDistribution:
        """DynaRS: high levels first, for generator and fake score alike."""
        return distribution if self.cold_start is None else self.cold_start.tilted(distribution, self.updates)

    def _ask_teacher(self, x: Tensor, latents: NoisyLatents, draw: RenoiseDraw) -> Tensor:
        """DynaDG: at first the real estimator leans toward the fake score, so that the two overlap."""
        scale = 0.0 if self.cold_start is None else self.cold_start.scale(self.updates)
        if scale == 0:
            return super()._ask_teacher(x, latents, draw)
        guidance = self.matching.guidance_scale
        return self.roles.x0("fake_score", latents, guidance_scale=guidance, adapter_scale=scale)

    # The update.

    def update(self, batch: Batch, learn: Learn) -> Update:
        """One generator step on both terms, then the fake score's steps."""
        judging = self.reward_weight > 0 and (self.cold_start is None or self.updates >= self.cold_start.updates)
        if self.reward_weight > 0:
            self.judge.check(batch.prompts)
        state = self.rollout_state(batch)
        draw = self.draw_renoise(state)
        samples: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        with learn("generator") as backward:
            for rows, share in self.micro_batches(len(batch)):
                latents = state.latents.select(rows)
                x = self.student_x0(latents)
                match = self.match(x, latents.conditioning, draw.select(rows))
                loss = dm_loss(x, match.target, match.n)
                if judging and self.joint == "refl":
                    reward = self.judge(x, batch.prompts[rows], gradient=True)
                    loss = loss + self.reward_weight * refl_loss(reward, self.margin)
                    weighted_sum(logs, share, reward_sample=reward.mean())
                backward(share * loss)
                samples.append(x.detach())
                weighted_sum(logs, share, loss=loss, gradient=match.gradient.mean(), normalizer=match.n.mean())
            if judging and self.joint == "grpo":
                logs |= self._grpo(batch, backward)
            if judging and self.joint == "nft":
                logs |= self._nft(batch, backward)
        if self.joint == "nft":
            self.roles.move_average("old", "generator", self.nft.old_decay(self.updates))
        x0 = torch.cat(samples)
        logs["sample_std"] = std(x0)
        return Update(logs | self.train_fake_score(batch, state, x0, learn))

    def _grpo(self, batch: Batch, backward: Backward) -> dict[str, Tensor]:
        """Add the gradient of GRPO on the generator's rollouts; matching takes the place of its KL term."""
        steps = self.grpo.draw_steps(self.steps, self.stream("train steps").common)
        shared = self.grpo.shared_noise(self.steps, steps, batch.groups)
        path = self.rollout(batch, "reward rollout", self.grpo.sampler, shared=shared)
        judged = self.sample_advantages(self.judge, path.x0, batch, self.history)
        logs = judged.logs(self.grpo.advantage_clip)
        for k in steps:
            for rows, share in self.micro_batches(len(batch)):
                predict, weight = self.predictor("generator", batch.conditioning.select(rows)), share / len(steps)
                loss, _, clipped = grpo_term(predict, self.grpo, path.select(rows), k, judged.advantages[rows])
                backward(weight * self.reward_weight * loss)
                weighted_sum(logs, weight, reward_loss=loss, clipped=clipped)
        return logs

    def _nft(self, batch: Batch, backward: Backward) -> dict[str, Tensor]:
        """Add the gradient of DiffusionNFT on the old policy's rollouts."""
        x0 = self.rollout(batch, "reward rollout", role="old").x0
        judged = self.sample_advantages(self.judge, x0, batch, self.history)
        o = optimality(judged.advantages, self.nft.advantage_clip)
        index = self.nft.draw_steps(len(batch), self.steps, self.stream("train steps"))
        logs = judged.logs(self.nft.advantage_clip)
        for turn, step in enumerate(index.unbind(1)):
            renoised = renoised_samples(x0, self.sigmas[step], batch.conditioning, self.stream("nft renoise", turn))
            for rows, share in self.micro_batches(len(batch)):
                weight = share / index.shape[1]
                loss, _ = nft_term(self.roles, self.nft, x0[rows], renoised.select(rows), o[rows])
                backward(weight * self.reward_weight * loss)
                weighted_sum(logs, weight, reward_loss=loss)
        return logs
