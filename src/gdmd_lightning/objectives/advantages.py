"""Advantages: how much better one member of a group is than the others. All methods share these functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["group", "batch", "none"]


@dataclass(frozen=True)
class Past:
    """What earlier updates say about the rewards of each row's prompt.

    Args:
        mean: ``[N]``.
        std: ``[N]``.
        known: Whether they are to be used, ``[N]``; a row for which they are not is compared within its group.
    """

    mean: Tensor
    std: Tensor
    known: Tensor


def group_mean(values: Tensor, groups: Tensor) -> Tensor:
    """Each row replaced by the mean of its group; ``values`` and ``groups`` are ``[N]``."""
    # There are at most as many groups as rows; reading the largest index would wait for the GPU.
    total = torch.zeros_like(values).index_add(0, groups, values)
    size = torch.zeros_like(total).index_add(0, groups, torch.ones_like(values))
    return (total / size.clamp(min=1))[groups]


def group_advantages(
    rewards: Tensor, groups: Tensor, spread: Spread = "batch", floor: float = 1e-4, past: Past | None = None
) -> Tensor:
    """``A = (r - mean of the group) / std``.

    Args:
        rewards: ``[N]``.
        groups: Index of each row's group, ``[N]``, from 0 without gaps.
        spread: Standard deviation to divide by: that of the ``group``, that of all centered rewards of the
            ``batch`` (steadier for small groups: with two members, ``group`` makes every advantage +-1), or
            ``none``.
        floor: Advantages are exactly 0 where the standard deviation is not above this.
        past: Takes the place of the group's mean, and of its standard deviation, where it is known.

    Returns:
        ``[N]``; 0 for a group of equal rewards, unless its past is known. A constant added to all rewards changes
        nothing, and permuted rows give permuted advantages.

    Source: GRPO (2402.03300), section 4.1.2; the batch's std as in Flow-GRPO (2505.05470).
    """
    centered = rewards - group_mean(rewards, groups)
    # The mean of equal numbers may have a rounding error, which must not count as a preference.
    centered = torch.where(_all_equal(rewards, groups), torch.zeros_like(centered), centered)
    if past is not None:
        centered = torch.where(past.known, rewards - past.mean, centered)
    if spread == "none":
        return centered
    if spread == "batch":
        std = centered.square().mean().sqrt().expand_as(centered)
    else:
        std = group_mean(centered.square(), groups).sqrt()
        std = std if past is None else torch.where(past.known, past.std, std)
    return torch.where(std > floor, centered / std.clamp(min=floor), torch.zeros_like(centered))


def decoupled_advantages(
    rewards: Tensor,
    weights: Sequence[float],
    groups: Tensor,
    spread: Spread = "group",
    floor: float = 1e-4,
    pasts: Sequence[Past | None] | None = None,
) -> Tensor:
    """``A = sum_k w_k A_k`` over the batch's standard deviation, each ``A_k`` normalized on its own within groups.

    Rewards that are summed first are confused: different combinations give the same advantage, and the reward with
    the largest spread decides. With one reward this is :func:`group_advantages` up to the batch's scale.

    Args:
        rewards: ``[N, R]``, one column per reward.
        weights: ``R`` numbers.
        groups: Index of each row's group, ``[N]``, from 0 without gaps.
        spread: Standard deviation that each reward is divided by.
        floor: As in :func:`group_advantages`.
        pasts: One per reward, see :func:`group_advantages`; ``None`` for none.

    Returns:
        ``[N]``.

    Source: GDPO (2601.05242), Eqs. 4 to 6.
    """
    columns = zip(rewards.unbind(1), pasts or [None] * rewards.shape[1], strict=True)
    each = [group_advantages(r, groups, spread, floor, past) for r, past in columns]
    total = torch.stack([w * a for w, a in zip(weights, each, strict=True)]).sum(0)
    if pasts is None:
        return group_advantages(total, groups, "batch", floor)
    # Not centered again, which would take away what the past says about a whole group.
    std = total.square().mean().sqrt()
    return torch.where(std > floor, total / std.clamp(min=floor), torch.zeros_like(total))


def _all_equal(values: Tensor, groups: Tensor) -> Tensor:
    """Whether all values of each row's group are equal, ``[N]``."""
    start = torch.zeros_like(values)
    largest, smallest = (
        start.scatter_reduce(0, groups, values, reduce, include_self=False) for reduce in ("amax", "amin")
    )
    return (largest == smallest)[groups]


def center_within(values: Tensor, strata: Tensor) -> Tensor:
    """Subtract each stratum's mean, so that only differences within a stratum are rewarded. ``[N]``."""
    return values - group_mean(values, strata)
