"""The graded verdict of the Shapes world's exact detector."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.shapes import detector


class ShapesReward(Reward):
    """Smooth grade in [0, 1] of how well a 32x32 picture shows what its prompt's metadata asks for."""

    name = "shapes"

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """See :meth:`Reward.score`."""
        return torch.from_numpy(detector.grade(detector.detect(images), prompts))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """See :meth:`Reward.check`."""
        for prompt in prompts:
            if "include" not in prompt.metadata:
                raise UserError(
                    f"prompt {prompt.text!r} has no GenEval metadata",
                    where=f"reward {self.name!r}",
                    remedy="use data.source: shapes, or a .jsonl whose lines carry 'include'",
                )
