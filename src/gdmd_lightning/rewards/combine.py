"""A weighted sum of rewards."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Finite, ranged
from gdmd_lightning.rewards.base import Reward, checked_score


@ranged
class CombinedReward(Reward):
    """``sum_i weight_i reward_i``; differentiable if all its parts are.

    Args:
        rewards: The rewards, at least one.
        weights: One weight per reward, not all 0.
        name: Name in logs; by default those of the rewards, joined by ``+``.
    """

    def __init__(self, rewards: list[Reward], weights: list[Finite], name: str | None = None) -> None:
        if not rewards or len(rewards) != len(weights):
            raise UserError(
                f"{len(rewards)} rewards and {len(weights)} weights",
                where="reward",
                remedy="give one weight per reward",
            )
        if not any(weights):
            raise UserError("all weights are 0", where="reward.weights", remedy="give a reward a weight")
        self.rewards, self.weights = rewards, weights
        self.name = "+".join(reward.name for reward in rewards) if name is None else name
        self.differentiable = all(reward.differentiable for reward in rewards)

    @property
    def parts(self) -> tuple[tuple[Reward, float], ...]:
        pairs = zip(self.rewards, self.weights, strict=True)
        return tuple((part, weight * inner) for reward, weight in pairs for part, inner in reward.parts)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        # A copy for each, since a reward may change its input in place.
        own = (images.clone() for _ in self.rewards) if len(self.rewards) > 1 else iter([images])
        scores = [w * checked_score(r, next(own), prompts) for r, w in zip(self.rewards, self.weights, strict=True)]
        return torch.stack(scores).sum(0)

    def check(self, prompts: Sequence[Prompt]) -> None:
        for reward in self.rewards:
            reward.check(prompts)

    def prepare(self) -> None:
        for reward in self.rewards:
            reward.prepare()

    def to(self, device: torch.device) -> None:
        for reward in self.rewards:
            reward.to(device)

    def sketch(self) -> nn.Module:
        return nn.ModuleList(sketch for reward in self.rewards if (sketch := reward.sketch()) is not None)
