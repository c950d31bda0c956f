"""Scenes of colored shapes and their anti-aliased 32x32 pictures, drawn for whole batches at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdmd_lightning.geneval.rules import RELATIONS, relation_strength
from gdmd_lightning.shapes.captions import COLORS, SHAPES

SIZE = 32
MAX_OBJECTS = 3
BACKGROUND = (0.94, 0.94, 0.94)
PALETTE = {
    "red": (0.86, 0.16, 0.14),
    "green": (0.16, 0.62, 0.22),
    "blue": (0.16, 0.30, 0.86),
    "yellow": (0.96, 0.78, 0.10),
}
# Half a square's side and a triangle's circumradius at "radius" 1; with these all shapes look equally large.
SQUARE, TRIANGLE = 0.86, 1.3
_REACH = {"circle": 1.0, "square": SQUARE * math.sqrt(2), "triangle": TRIANGLE}
_GAP = 1.0  # pixels of background between two shapes


@dataclass(frozen=True)
class Scenes:
    """A batch of scenes as arrays.

    Args:
        shape: Index into ``SHAPES``, ``[N, 3]``; -1 where there is no object.
        color: Index into ``COLORS``, ``[N, 3]``.
        center: ``(x, y)`` in pixels, ``[N, 3, 2]``.
        radius: Size in pixels, ``[N, 3]``; see ``SQUARE`` and ``TRIANGLE``.
    """

    shape: np.ndarray
    color: np.ndarray
    center: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return len(self.shape)


def sample_scenes(contents: Sequence[dict[str, Any]], rng: np.random.Generator) -> Scenes:
    """Draw one scene per content (GenEval-style metadata); objects do not touch, and relations hold clearly.

    Colors that the content does not specify are drawn uniformly.
    """
    n = len(contents)
    shape = np.full((n, MAX_OBJECTS), -1)
    color = rng.integers(len(COLORS), size=(n, MAX_OBJECTS))
    relation = np.full(n, -1)
    for row, content in enumerate(contents):
        slot = 0
        for clause in content["include"]:
            for _ in range(clause["count"]):
                shape[row, slot] = SHAPES.index(clause["class"])
                if "color" in clause:
                    color[row, slot] = COLORS.index(clause["color"])
                slot += 1
            if "position" in clause:
                relation[row] = RELATIONS.index(clause["position"][0])
    crowded = (shape >= 0).sum(1) == MAX_OBJECTS
    radius = np.where(crowded[:, None], rng.uniform(3.7, 4.5, shape.shape), rng.uniform(4.4, 6.0, shape.shape))
    center = _place(shape, radius, relation, rng)
    return Scenes(shape, color, center, radius)


def _place(shape: np.ndarray, radius: np.ndarray, relation: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Centers by rejection sampling: 32 tries per round for all scenes that are not placed yet."""
    reach = radius * np.array([_REACH[s] for s in SHAPES] + [0.0])[shape]
    center = np.zeros((*shape.shape, 2))
    todo = np.arange(len(shape))
    while len(todo):
        edge = reach[todo][:, None, :, None] + 0.5
        tries = rng.uniform(edge, SIZE - edge, size=(len(todo), 32, MAX_OBJECTS, 2))
        good = np.ones(tries.shape[:2], dtype=bool)
        for i in range(MAX_OBJECTS):
            for j in range(i):
                apart = np.linalg.norm(tries[:, :, i] - tries[:, :, j], axis=-1)
                needed = reach[todo, i] + reach[todo, j] + _GAP
                both = (shape[todo, i] >= 0) & (shape[todo, j] >= 0)
                good &= (apart >= needed[:, None]) | ~both[:, None]
        sizes = 2 * (reach[todo, 0] + reach[todo, 1])
        strength = relation_strength(tries[:, :, 1] - tries[:, :, 0], sizes[:, None, None])
        wanted = np.take_along_axis(strength, relation[todo, None, None].clip(0), axis=2)[..., 0]
        good &= (wanted > 0.6) | (relation[todo, None] < 0)
        found, first = good.any(1), good.argmax(1)
        center[todo[found]] = tries[found, first[found]]
        todo = todo[~found]
    return center


def coverage(shape: Tensor, center: Tensor, extent: Tensor) -> Tensor:
    """Share of each pixel that a shape covers, from its signed distance.

    Args:
        shape: Index into ``SHAPES``, ``[...]``.
        center: ``(x, y)`` in pixels, ``[..., 2]``.
        extent: Radius of a circle, half side of a square or circumradius of a triangle, in pixels, ``[...]``.

    Returns:
        ``[..., 32, 32]`` in [0, 1].
    """
    grid = torch.arange(SIZE, device=center.device, dtype=center.dtype) + 0.5
    x = grid - center[..., 0, None, None]
    y = grid[:, None] - center[..., 1, None, None]
    extent = extent[..., None, None]
    circle = torch.sqrt(x**2 + y**2) - extent
    square = torch.maximum(x.abs(), y.abs()) - extent
    slanted = x.abs() * math.sqrt(3) / 2 - y / 2
    triangle = torch.maximum(slanted, y.expand_as(slanted)) - extent / 2
    distance = torch.stack([circle, square, triangle], dim=-1)
    index = shape[..., None, None, None].clamp(min=0).expand(*distance.shape[:-1], 1)
    return (0.5 - distance.gather(-1, index)[..., 0]).clamp(0, 1)


def render(scenes: Scenes) -> Tensor:
    """Draw a batch of scenes as pictures ``[N, 3, 32, 32]`` in [0, 1]."""
    shape = torch.from_numpy(scenes.shape)
    factor = torch.tensor([1.0, SQUARE, TRIANGLE])[shape.clamp(min=0)]
    extent = torch.from_numpy(scenes.radius).float() * factor
    alpha = coverage(shape, torch.from_numpy(scenes.center).float(), extent) * (shape >= 0)[..., None, None]
    palette = torch.tensor([PALETTE[name] for name in COLORS])[torch.from_numpy(scenes.color)]
    images = torch.tensor(BACKGROUND)[None, :, None, None].expand(len(scenes), 3, SIZE, SIZE)
    for i in range(MAX_OBJECTS):
        mask = alpha[:, i, None]
        images = images * (1 - mask) + palette[:, i, :, None, None] * mask
    return images
