"""How a generator chooses what its prompts leave open: color, position and size of the detected objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.rules import Detection
from gdmd_lightning.prompts import Prompt

CELLS = 3
"""Rows and columns of equal cells that positions are counted in."""
SIZES = (0.0, 0.25, 0.3, 0.35, 0.4, 2.0)
"""Edges of the bins of sizes: mean side of an object's box, as a share of the picture's side."""


@dataclass(frozen=True)
class FreeChoices:
    """Detected objects by what their prompts leave open; pictures whose prompts do not leave it open have no row.

    Args:
        color: ``[F, colors]``, of prompts that name no color.
        position: ``[G, 9]``: the cell of the box's center, row by row, of prompts that name no position.
        size: ``[N, 5]``, of all prompts.
    """

    color: Tensor
    position: Tensor
    size: Tensor


def free_choices(images: Tensor, prompts: Sequence[Prompt], detector: Detector, colors: Sequence[str]) -> FreeChoices:
    """Count the attributes of the detected objects.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        prompts: ``N`` prompts with GenEval's metadata.
        detector: Finds the objects.
        colors: All colors.
    """
    found = detector.detect(images, prompts)
    side = images.shape[-1]
    color = torch.zeros(len(images), len(colors), dtype=torch.float64)
    position = torch.zeros(len(images), CELLS**2, dtype=torch.float64)
    size = torch.zeros(len(images), len(SIZES) - 1, dtype=torch.float64)
    for row, objects in enumerate(found):
        for each in objects:
            if each.color is not None:
                color[row, colors.index(each.color)] += 1
            position[row, _cell(each, images.shape[-2], side)] += 1
            size[row, _size(each, side)] += 1
    return FreeChoices(color[_without(prompts, "color")], position[_without(prompts, "position")], size)


def _without(prompts: Sequence[Prompt], attribute: str) -> Tensor:
    """Which prompts do not name an attribute, ``[N]``."""
    return torch.tensor(
        [not any(attribute in clause for clause in prompt.metadata["include"]) for prompt in prompts], dtype=torch.bool
    )


def _cell(found: Detection, height: int, width: int) -> int:
    left, top, right, bottom = found.box
    column, row = (left + right) / 2 / width, (top + bottom) / 2 / height
    return min(int(CELLS * row), CELLS - 1) * CELLS + min(int(CELLS * column), CELLS - 1)


def _size(found: Detection, side: int) -> int:
    left, top, right, bottom = found.box
    share = (right - left + bottom - top) / 2 / side
    return next(i for i, (low, high) in enumerate(pairwise(SIZES)) if low <= share < high)
