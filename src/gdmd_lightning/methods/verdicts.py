"""From rewards to advantages: which targets are compared with which, and the record of what was judged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from gdmd_lightning.objectives.advantages import Spread, centre_within, group_advantages
from gdmd_lightning.objectives.policy import gradient_weight
from gdmd_lightning.prompts import Prompt

if TYPE_CHECKING:
    from gdmd_lightning.methods.targets import Targets
    from gdmd_lightning.samplers import State


@dataclass(frozen=True)
class Verdict:
    """How rewards of targets become advantages.

    Args:
        compare: The targets of one ``state`` with each other (the paper's), all targets of a ``prompt``'s states,
            or each target with its own ``sample``.
        spread: Whose standard deviation divides, see :func:`group_advantages`.
        centre_levels: Remove the batch's mean of each place in the group first (the rank of its renoise level, or
            its snapshot), so that directions are compared and not levels: targets at high noise please a reward
            less wherever they point, and would always be the ones pushed away from.
        clip: ``A_max``.
        score_samples: Judge the samples too, to log and record them; ``compare: sample`` does anyway.
    """

    compare: Literal["state", "prompt", "sample"] = "prompt"
    spread: Spread = "batch"
    centre_levels: bool = False
    clip: float = 2.0
    score_samples: bool = False

    @property
    def asks_for_samples(self) -> bool:
        """Whether the reward must see the samples beside their targets."""
        return self.score_samples or self.compare == "sample"

    def advantages(self, rewards: Tensor, own: Tensor | None, prompts: Tensor) -> Tensor:
        """``[B, M]`` from rewards ``[B, M]``, the samples' own ``[B]``, and each sample's prompt number ``[B]``."""
        batch, size = rewards.shape
        values = rewards.flatten()
        if self.compare == "sample":
            assert own is not None
            values = values - own.repeat_interleave(size)
        if self.centre_levels:
            values = centre_within(values, torch.arange(size, device=rewards.device).repeat(batch))
        match self.compare:
            case "state":
                groups = torch.arange(batch, device=rewards.device).repeat_interleave(size)
            case "prompt":
                groups = prompts.repeat_interleave(size)
            case "sample":
                return _scaled(values).view(batch, size)
        return group_advantages(values, groups, self.spread).view(batch, size)


def _scaled(difference: Tensor, floor: float = 1e-4) -> Tensor:
    """Differences divided by their root mean square, whose zero means "as good as the sample"."""
    size = difference.square().mean().sqrt()
    return torch.where(size > floor, difference / size.clamp(min=floor), torch.zeros_like(difference))


@dataclass(frozen=True)
class Judged:
    """One update's targets with what was said of them, ``B`` states of ``M`` targets, for logs and the record."""

    state: State
    x: Tensor  # [B, C, H, W], the samples
    targets: Targets
    rewards: Tensor  # [B, M]
    own: Tensor | None  # [B], the samples' rewards where asked
    advantage: Tensor  # [B, M]
    optimality: Tensor  # [B, M]
    prompts: tuple[Prompt, ...]
    strength: float  # lambda_policy
    gradient: Tensor  # [B, M], mean |g| of each target's normalised gradient

    def weight(self) -> Tensor:
        """The signed weight of each distillation gradient, to first order, ``[B, M]``."""
        return gradient_weight(self.optimality, 2 * self.strength)

    def without_pictures(self) -> Judged:
        """The same with its latents dropped, small enough to wait for the record to be written."""
        nothing = self.x[:0]
        state, targets = replace(self.state, x_sigma=nothing), replace(self.targets, y=nothing)
        return replace(self, x=nothing, state=state, targets=targets)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's, over all elements; 0 where either is constant."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-8)
