"""Groups of targets, and how the rewards of targets and of samples become advantages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.objectives.advantages import Spread, center_within, decoupled_advantages, group_advantages
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.judge import Judge


@dataclass(frozen=True)
class TargetGroup:
    """The implicit targets of one student state.

    Args:
        size: Number of targets, ``M``, at least 1.
        over: What distinguishes them: the ``renoise`` level, the fake score's ``snapshot``, or ``both``.
        snapshots: Number of past fake scores to keep in addition to the current one, if ``over`` uses them.
        snapshot_every: Updates between two snapshots, at least 1.

    Raises:
        UserError: If a number is out of range.
    """

    size: int = 4
    over: Literal["renoise", "snapshot", "both"] = "renoise"
    snapshots: int = 2
    snapshot_every: int = 20

    def __post_init__(self) -> None:
        for name in ("size", "snapshots", "snapshot_every"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}", where=f"model.targets.{name}", remedy="use at least 1"
                )


@dataclass(frozen=True)
class TargetAdvantages:
    """How rewards of targets become advantages.

    Args:
        compare: The group of a target: the targets of one ``state`` (as in the paper), all targets of a
            ``prompt``'s states, or each target against its own ``sample``.
        spread: Standard deviation to divide by, see :func:`group_advantages`.
        center_strata: First subtract the batch's mean at each position in the group (the rank of its renoise
            level, or its snapshot), so that directions are compared, not levels. Otherwise targets at high
            noise, which get lower rewards whatever their direction, would always be pushed away from.
        clip: ``A_max``, above 0.
        score_samples: Also score the samples, for logs and the record; ``compare: sample`` does so anyway.

    Raises:
        UserError: If ``clip`` is not positive.
    """

    compare: Literal["state", "prompt", "sample"] = "prompt"
    spread: Spread = "batch"
    center_strata: bool = False
    clip: float = 2.0
    score_samples: bool = False

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise UserError(f"clip is {self.clip}", where="model.advantages.clip", remedy="it must be above 0")

    @property
    def needs_samples(self) -> bool:
        """Whether the reward must score the samples as well as their targets."""
        return self.score_samples or self.compare == "sample"

    def __call__(self, rewards: Tensor, sample_reward: Tensor | None, groups: Tensor) -> Tensor:
        """Advantages ``[B, M]``.

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
        match self.compare:
            case "state":
                members = torch.arange(batch, device=rewards.device).repeat_interleave(size)
            case "prompt":
                members = groups.repeat_interleave(size)
            case "sample":
                return _over_rms(values).view(batch, size)
        return group_advantages(values, members, self.spread).view(batch, size)


@dataclass(frozen=True)
class SampleAdvantages:
    """How rewards of samples become advantages within the samples of a prompt.

    Args:
        spread: Standard deviation to divide by, see :func:`group_advantages`.
        rewards: Several rewards (:class:`CombinedReward`) are normalized ``jointly``, as their weighted sum, or
            ``separately``, before they are summed, so that none decides by its scale; then the sum is divided by the
            batch's standard deviation (GDPO, 2601.05242, with ``spread: group``).
    """

    spread: Spread = "batch"
    rewards: Literal["jointly", "separately"] = "jointly"

    def __call__(self, judge: Judge, x0: Tensor, prompts: Sequence[Prompt], groups: Tensor) -> tuple[Tensor, Tensor]:
        """Rewards and advantages of samples, ``[B]`` each.

        Args:
            judge: Scores the samples.
            x0: Samples, ``[B, C, H, W]``.
            prompts: One per sample.
            groups: Index of each sample's prompt, ``[B]``.
        """
        groups = groups.to(x0.device)
        if self.rewards == "jointly":
            total = judge(x0, prompts)
            return total, group_advantages(total, groups, self.spread)
        each = judge.each(x0, prompts)
        weights = each.new_tensor(judge.weights)
        return (each * weights).sum(1), decoupled_advantages(each, weights, groups, self.spread)


def _over_rms(difference: Tensor, floor: float = 1e-4) -> Tensor:
    """Differences over their root mean square, not centered: zero still means "as good as the sample"."""
    size = difference.square().mean().sqrt()
    return torch.where(size > floor, difference / size.clamp(min=floor), torch.zeros_like(difference))
