"""The smooth grade of the Shapes detector as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdmd_lightning.geneval.metadata import check_metadata
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.network import check_pictures
from gdmd_lightning.shapes.captions import COLORS, SHAPES
from gdmd_lightning.shapes.detector import grade


class ShapesReward(Reward):
    """How well a 32x32 picture shows what its prompt's metadata asks for, in [0, 1].

    Args:
        name: Name in logs.
    """

    def __init__(self, name: str = "shapes") -> None:
        self.name = name

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_pictures(images, [prompt.text for prompt in prompts], f"reward {self.name!r}")
        return torch.from_numpy(grade(images, prompts))

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_metadata(prompts, f"reward {self.name!r}", classes=SHAPES, colors=COLORS)
