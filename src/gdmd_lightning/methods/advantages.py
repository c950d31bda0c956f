"""Groups of targets, and how the rewards of targets and of samples become advantages."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.history import PromptHistory, RunningStatistics
from gdmd_lightning.methods.settings import refuse_unused
from gdmd_lightning.objectives.advantages import (
    Spread,
    center_within,
    decoupled_advantages,
    group_advantages,
    group_mean,
)
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Count, Positive, ranged
from gdmd_lightning.ranks import all_groups, gathered, own_part
from gdmd_lightning.rewards.judge import Judge


@ranged
@dataclass(frozen=True)
class TargetGroup:
    """The implicit targets of one student state.

    Args:
        size: Number of targets, ``M``.
        over: What distinguishes them: the ``renoise`` level, the fake score's ``snapshot``, or ``both``.
        snapshots: Number of past fake scores to keep in addition to the current one, if ``over`` uses them. Each is
            renewed in its turn, and a group asks as many as it has targets.
        snapshot_every: Updates between two snapshots.

    Raises:
        UserError: If a value is out of range, or snapshots are set which ``over`` does not use.
    """

    size: Count = 4
    over: Literal["renoise", "snapshot", "both"] = "renoise"
    snapshots: Count = 2
    snapshot_every: Count = 20

    def __post_init__(self) -> None:
        if self.over == "renoise":
            refuse_unused(self, "model.targets", "over renoise", "snapshots", "snapshot_every")

    @property
    def past(self) -> int:
        """Number of past fake scores that are in use."""
        return 0 if self.over == "renoise" else self.snapshots


@dataclass(frozen=True)
class JudgedGroup:
    """What the reward says about the targets of a batch.

    Args:
        rewards: Weighted sum of the rewards, ``[B, M]``.
        sample_reward: The same of the samples, ``[B]``; ``None`` if they were not scored.
        advantages: ``[B, M]``.
    """

    rewards: Tensor
    sample_reward: Tensor | None
    advantages: Tensor


@ranged
@dataclass(frozen=True)
class TargetAdvantages:
    """How rewards of targets become advantages.

    Args:
        compare: The group of a target: the targets of one ``state`` (as in the paper), all targets of a
            ``prompt``'s states, or each target against its own ``sample``.
        spread: Standard deviation to divide by, see :func:`group_advantages`; not for ``compare: sample``, which
            divides by the root mean square of the batch.
        center_strata: First subtract the batch's mean at each position in the group (the rank of its renoise
            level, or its snapshot), so that directions are compared, not levels. Otherwise targets at high
            noise, which get lower rewards whatever their direction, would always be pushed away from.
        clip: ``A_max``.
        score_samples: Also score the samples, for logs and the record; ``compare: sample`` does so anyway.
        rewards: Several rewards (:class:`CombinedReward`) are normalized ``jointly``, as their weighted sum, or
            ``separately``, before they are summed, as in :class:`SampleAdvantages`.

    Raises:
        UserError: If a value is out of range, or ``spread`` is set for ``compare: sample``.
    """

    compare: Literal["state", "prompt", "sample"] = "prompt"
    spread: Spread = "batch"
    center_strata: bool = False
    clip: Positive = 2.0
    score_samples: bool = False
    rewards: Literal["jointly", "separately"] = "jointly"

    def __post_init__(self) -> None:
        if self.compare == "sample":
            refuse_unused(self, "model.advantages", "compare sample", "spread")

    @property
    def needs_samples(self) -> bool:
        """Whether the reward must score the samples as well as their targets."""
        return self.score_samples or self.compare == "sample"

    def to_judge(self, targets: Tensor, x: Tensor, batch: Batch) -> tuple[Tensor, tuple[Prompt, ...]]:
        """The latents that the reward must score, with their prompts: the targets, and the samples if needed.

        Args:
            targets: ``[B, M, C, H, W]``.
            x: The samples, ``[B, C, H, W]``.
            batch: Prompts of the samples.
        """
        latents = targets.flatten(0, 1)
        prompts = tuple(prompt for prompt in batch.prompts for _ in range(targets.shape[1]))
        return (torch.cat([latents, x]), (*prompts, *batch.prompts)) if self.needs_samples else (latents, prompts)

    def judged(self, judge: Judge, each: Tensor, size: int, batch: Batch) -> JudgedGroup:
        """What the rewards of :meth:`to_judge` say about the targets of a batch.

        Args:
            judge: Combines the rewards.
            each: Its scores, ``[rows, R]``.
            size: ``M``.
            batch: Groups of the samples.
        """
        rows = len(batch) * size

        def apart(scored: Tensor) -> tuple[Tensor, Tensor | None]:
            of_targets, of_samples = scored.tensor_split((rows,))
            return of_targets.view(len(batch), size), of_samples if self.needs_samples else None

        rewards, sample_reward = apart(judge.combined(each))
        if self.rewards == "jointly":
            return JudgedGroup(rewards, sample_reward, self._over_ranks(rewards, sample_reward, batch.groups))
        parts = [self._over_ranks(*apart(scored), batch.groups) for scored in each.unbind(1)]
        combined = judge.combined(torch.stack(parts, dim=1))
        # The second normalization only brings the sum to the batch's scale: the parts have been compared already.
        rescale = replace(self, spread="batch", center_strata=False)
        advantages = rescale._over_ranks(combined, torch.zeros_like(combined[:, 0]), batch.groups)
        return JudgedGroup(rewards, sample_reward, advantages)

    def _over_ranks(self, rewards: Tensor, sample_reward: Tensor | None, groups: Tensor) -> Tensor:
        """Advantages of this rank's targets in the batch of all ranks; arguments as below."""
        of_samples = None if sample_reward is None else gathered(sample_reward)
        return own_part(self(gathered(rewards), of_samples, all_groups(groups)))

    def __call__(self, rewards: Tensor, sample_reward: Tensor | None, groups: Tensor) -> Tensor:
        """Advantages ``[B, M]`` by one reward.

        Args:
            rewards: Rewards of the targets, ``[B, M]``.
            sample_reward: Rewards of the samples, ``[B]``; required for ``compare: sample``.
            groups: Index of each sample's prompt, ``[B]``.
        """
        batch, size = rewards.shape
        values = rewards.flatten()
        if self.compare == "sample":
            assert sample_reward is not None
            values = values - sample_reward.repeat_interleave(size)
        if self.center_strata:
            values = center_within(values, torch.arange(size, device=rewards.device).repeat(batch))
        if self.compare == "sample":
            return _over_rms(values).view(batch, size)
        return group_advantages(values, self._members(groups.to(rewards.device), size), self.spread).view(batch, size)

    def check(self, batch_size: int, group_size: int, targets: int) -> None:
        """Fail if every advantage would be 0, whatever the rewards.

        A target is compared with the other targets of its state or its prompt, or with its sample. ``center_strata``
        subtracts means over the samples of a batch, which are the values themselves if there is only one sample.

        Args:
            batch_size: Samples per update.
            group_size: Samples per prompt.
            targets: Targets per sample.

        Raises:
            UserError: If a group has one member, or its centered values are all 0.
        """
        what = "the reward would have no effect: all advantages would be 0, because "
        members = {"state": targets, "prompt": group_size * targets, "sample": 2}[self.compare]
        if members == 1:
            larger = "model.targets.size" if self.compare == "state" else "model.targets.size or data.group_size"
            raise UserError(
                f"{what}each {self.compare} has one target, which is compared with itself",
                where="model.advantages.compare",
                remedy=f"use a larger {larger}, or model.lambda_policy 0",
            )
        if self.center_strata and batch_size == 1:
            raise UserError(
                f"{what}the mean over the only sample of a batch is subtracted from it",
                where="model.advantages.center_strata",
                remedy="use a larger data.batch_size, or set it to false",
            )

    def without_spread(self, advantages: Tensor, groups: Tensor) -> Tensor:
        """Share of groups whose advantages are all 0, a scalar on the device.

        Args:
            advantages: ``[B, M]``.
            groups: Index of each sample's prompt, ``[B]``.
        """
        members = self._members(groups.to(advantages.device), advantages.shape[1])
        # All groups have the same size, so the share of members is that of groups.
        return (group_mean(advantages.flatten().abs(), members) == 0).float().mean()

    def _members(self, groups: Tensor, size: int) -> Tensor:
        """Index of each target's group, ``[B * M]``."""
        if self.compare == "prompt":
            return groups.repeat_interleave(size)
        return torch.arange(len(groups), device=groups.device).repeat_interleave(size)


@dataclass(frozen=True)
class JudgedSamples:
    """Samples that a reward has compared within their prompts.

    Args:
        rewards: ``[B]``.
        advantages: ``[B]``.
        groups: Index of each sample's prompt, ``[B]``.
    """

    rewards: Tensor
    advantages: Tensor
    groups: Tensor

    def logs(self, clip: float) -> dict[str, Tensor]:
        """Scalars to log, on the device; ``clip`` is the largest advantage that counts."""
        return {
            "reward_sample": self.rewards.mean(),
            "groups_without_spread": (group_mean(self.advantages.abs(), self.groups) == 0).float().mean(),
            "advantage_clipped": (self.advantages.abs() >= clip).float().mean(),
        }


@ranged
@dataclass(frozen=True)
class SampleAdvantages:
    """How rewards of samples become advantages within the samples of a prompt.

    Args:
        spread: Standard deviation to divide by, see :func:`group_advantages`.
        rewards: Several rewards (:class:`CombinedReward`) are normalized ``jointly``, as their weighted sum, or
            ``separately``, before they are summed, so that none decides by its scale; then the sum is divided by the
            batch's standard deviation (GDPO, 2601.05242, with ``spread: group``).
        running: Compare with the prompt's rewards of earlier updates too; null for the group alone.
    """

    spread: Spread = "batch"
    rewards: Literal["jointly", "separately"] = "jointly"
    running: RunningStatistics | None = None

    def __call__(self, judge: Judge, x0: Tensor, batch: Batch, history: PromptHistory) -> JudgedSamples:
        """Judge samples.

        Args:
            judge: Scores the samples.
            x0: Samples, ``[B, C, H, W]``.
            batch: Prompts and groups of the samples.
            history: The run's; used and extended if ``running`` is set.
        """
        prompts, own, groups = batch.prompts, batch.groups.to(x0.device), all_groups(batch.groups).to(x0.device)
        if self.rewards == "jointly":
            total = judge(x0, prompts)
            past = None if self.running is None else history.add(prompts, total[:, None], self.running)[0]
            advantages = group_advantages(gathered(total), groups, self.spread, past=past)
            return JudgedSamples(total, own_part(advantages), own)
        each = judge.each(x0, prompts)
        pasts = None if self.running is None else history.add(prompts, each, self.running)
        advantages = decoupled_advantages(gathered(each), judge.weights, groups, self.spread, pasts=pasts)
        return JudgedSamples(judge.combined(each), own_part(advantages), own)


def _over_rms(difference: Tensor, floor: float = 1e-4) -> Tensor:
    """Differences over their root mean square, not centered: zero still means "as good as the sample"."""
    size = difference.square().mean().sqrt()
    return torch.where(size > floor, difference / size.clamp(min=floor), torch.zeros_like(difference))
