"""Exact detector of the Shapes world, which finds colored shapes for GenEval's rules, and a smooth grade.

It uses color segmentation, connected components and overlap with templates, on a whole batch at once. The
*verdict* comes from the rules in ``geneval/``. The *grade* is a reward in [0, 1] that responds to every
small gain in shape, color, count or position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.rules import RELATION_THRESHOLD, RELATIONS, Detection, Rules, relation_strength
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import COLORS, SHAPES
from gdmd_lightning.shapes.scenes import BACKGROUND, PALETTE, SIZE, coverage

MIN_AREA = 16.0  # pixels; the smallest rendered shape has 28
# Overlap of a component with its best template; a wrong template has about 0.85 of the right one's overlap.
MIN_OVERLAP = 0.82

_COLORS = torch.tensor([BACKGROUND, *(PALETTE[name] for name in COLORS)])
# Extent of a shape of area 1: circle's radius, square's half side, triangle's circumradius.
_UNIT = torch.tensor([1 / math.sqrt(math.pi), 0.5, math.sqrt(4 / (3 * math.sqrt(3)))])
_SPECK = 6  # components of fewer pixels are noise from the decoder, not objects


@dataclass(frozen=True)
class Components:
    """The connected regions of one color in a batch of pictures, ``K`` in all.

    Args:
        image: Index of the picture, ``[K]``.
        area: Soft area in pixels, ``[K]``.
        box: Left, top, right and bottom edge in pixels, ``[K, 4]``.
        overlap: Soft intersection over union with each shape's template of equal area, ``[K, 3]``.
        color: Nearest palette color, index into ``COLORS``, ``[K]``.
        likeness: Similarity of the mean color to each palette color, ``[K, 4]`` in (0, 1].
    """

    image: np.ndarray
    area: np.ndarray
    box: np.ndarray
    overlap: np.ndarray
    color: np.ndarray
    likeness: np.ndarray

    def of(self, image: int) -> Components:
        """The components of one picture."""
        k = self.image == image
        return Components(self.image[k], self.area[k], self.box[k], self.overlap[k], self.color[k], self.likeness[k])


class ShapesDetector(Detector):
    """Finds the shapes of 32x32 pictures: components that are large enough and fit a template well enough.

    The score of a detection is its overlap with the template. It is not a probability, and the detector has
    its own thresholds, so the rules add none. Unlike in GenEval, colors are matched before objects are
    counted: the detector reads colors exactly, and a picture may show the same class in two colors.
    """

    rules = Rules(score_threshold=0.0, counting_threshold=0.0, max_per_class=SIZE * SIZE, color_first=True)
    classes, colors = SHAPES, COLORS

    def detect(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        found = find_components(images)
        sure = (found.area >= MIN_AREA) & (found.overlap.max(1, initial=0) >= MIN_OVERLAP)
        out: list[list[Detection]] = [[] for _ in images]
        for k in np.flatnonzero(sure).tolist():
            kind = int(found.overlap[k].argmax())
            left, top, right, bottom = found.box[k].tolist()
            out[found.image[k]].append(
                Detection(
                    label=SHAPES[kind],
                    box=(left, top, right, bottom),
                    score=float(found.overlap[k, kind]),
                    color=COLORS[found.color[k]],
                )
            )
        return out


@torch.no_grad()
def find_components(images: Tensor) -> Components:
    """Find the connected regions of each palette color in pictures ``[N, 3, 32, 32]`` in [0, 1].

    Raises:
        UserError: If the pictures have another size.
    """
    height, width = images.shape[2:]
    if (height, width) != (SIZE, SIZE):
        raise UserError(
            f"it cannot read pictures of {height}x{width}",
            where="Shapes detector",
            remedy=f"use pictures of {SIZE}x{SIZE}, or scores that are not of the Shapes world",
        )
    images = images.detach().float().cpu().clamp(0, 1)
    distance = (images[:, None] - _COLORS[None, :, :, None, None]).square().sum(2)
    nearest = distance.argmin(1).numpy()  # [N, H, W], 0 is the background
    planes = np.stack([nearest == c for c in range(1, len(_COLORS))], axis=1)
    # One labeling for the whole batch: pixels connect within a picture and a color only.
    structure = np.zeros((3, 3, 3, 3), dtype=bool)
    structure[1, 1] = ndimage.generate_binary_structure(2, 1)
    labels, found = ndimage.label(planes, structure)
    slices = ndimage.find_objects(labels)
    pixels = np.bincount(labels.ravel(), minlength=found + 1)[1:]
    keep = [k for k in range(found) if pixels[k] >= _SPECK]
    image = np.array([slices[k][0].start for k in keep], dtype=int)
    color = np.array([slices[k][1].start for k in keep], dtype=int)
    if not keep:
        return Components(image, np.zeros(0), np.zeros((0, 4)), np.zeros((0, 3)), color, np.zeros((0, 4)))

    own = torch.from_numpy(np.stack([labels[i, c] == k + 1 for i, c, k in zip(image, color, keep, strict=True)]))
    picture = images[torch.from_numpy(image)]
    alpha = _alpha(picture, own, _COLORS[1:][torch.from_numpy(color)])
    edges = [slices[k][2:] for k in keep]
    box = np.array([(x.start, y.start, x.stop, y.stop) for y, x in edges], dtype=float)
    overlap, likeness = _overlap(alpha), _likeness(picture, alpha * own)
    return Components(image, alpha.sum((1, 2)).numpy(), box, overlap.numpy(), color, likeness.numpy())


def _alpha(picture: Tensor, own: Tensor, paint: Tensor) -> Tensor:
    """Share of each pixel that a component covers, ``[K, H, W]``.

    It is the pixel's position on the line from the background's color to the component's.
    """
    region = torch.nn.functional.max_pool2d(own[:, None].float(), 3, stride=1, padding=1)[:, 0]
    background = _COLORS[0]
    axis = paint - background
    alpha = (
        torch.einsum("kchw,kc->khw", picture - background[:, None, None], axis) / axis.square().sum(1)[:, None, None]
    )
    return alpha.clamp(0, 1) * region


def _overlap(alpha: Tensor) -> Tensor:
    """Soft intersection over union with each shape's template of equal area and centroid, ``[K, 3]``."""
    area = alpha.sum((1, 2))
    grid = torch.arange(SIZE) + 0.5
    centroid = torch.stack([(alpha.sum(1) * grid).sum(1), (alpha.sum(2) * grid).sum(1)], dim=1) / area[:, None]
    kinds = torch.arange(len(SHAPES)).expand(len(alpha), -1)
    extent = area.sqrt()[:, None] * _UNIT
    templates = coverage(kinds, centroid[:, None].expand(-1, len(SHAPES), -1), extent)
    shared = torch.minimum(alpha[:, None], templates).sum((2, 3))
    return shared / torch.maximum(alpha[:, None], templates).sum((2, 3))


def _likeness(picture: Tensor, weight: Tensor) -> Tensor:
    """Similarity of a component's mean color to each palette color, ``[K, 4]`` in (0, 1]."""
    weight = weight[:, None]
    mean = (picture * weight).sum((2, 3)) / weight.sum((2, 3))
    return torch.exp(-(mean[:, None] - _COLORS[1:]).square().sum(2) / (2 * 0.25**2))


def grade(images: Tensor, prompts: Sequence[Prompt]) -> np.ndarray:
    """Smooth reward of each picture for its prompt, ``[N]`` float32 in [0, 1].

    Half the mean and half the product of the grades of all clauses.
    """
    found = find_components(images)
    return np.array([_grade(found.of(i), prompt.metadata) for i, prompt in enumerate(prompts)], dtype=np.float32)


def _grade(found: Components, metadata: dict[str, Any]) -> float:
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    first = np.cumsum([0] + [clause["count"] for clause in metadata["include"]])
    if not len(found.area):
        return 0.0
    kind = np.exp((found.overlap - found.overlap.max(1, keepdims=True)) / 0.03)
    kind *= found.overlap / kind.sum(1, keepdims=True)  # probability of each shape, times its quality
    present = np.minimum(found.area / MIN_AREA, 1.0)
    any_color = found.likeness.max(1)
    match = np.stack(
        [
            kind[:, SHAPES.index(clause["class"])]
            * present
            * (found.likeness[:, COLORS.index(clause["color"])] if "color" in clause else any_color)
            for clause in wanted
        ]
    )
    rows, columns = linear_sum_assignment(-match)
    owner = dict(zip(rows.tolist(), columns.tolist(), strict=True))
    clauses = [float(match[row, owner[row]]) if row in owner else 0.0 for row in range(len(wanted))]
    for exclude in metadata.get("exclude", []):
        others = np.setdiff1d(np.arange(len(found.area)), columns)
        surplus = kind[others, SHAPES.index(exclude["class"])] * present[others]
        clauses.append(float(np.exp(-surplus.sum())) * float(np.mean(clauses)))
    for i, clause in enumerate(metadata["include"]):
        if "position" in clause:
            relation, landmark = clause["position"]
            one, other = owner.get(int(first[i])), owner.get(int(first[landmark]))
            held = 0.0
            if one is not None and other is not None:
                held = _held(found, one, other, relation)
            clauses.append(held * float(np.mean(clauses)))
    return 0.5 * float(np.mean(clauses)) + 0.5 * float(np.prod(clauses))


def _held(found: Components, one: int, landmark: int, relation: str) -> float:
    """How clearly a relation holds, in (0, 1).

    A sigmoid around GenEval's threshold. The strength is averaged with and without shortening the offset,
    because GenEval's rule alone is constant while the shortened offset is 0.
    """
    top_left, bottom_right = found.box[:, :2], found.box[:, 2:]
    center, size = (top_left + bottom_right) / 2, bottom_right - top_left
    offset, sizes = center[one] - center[landmark], size[one] + size[landmark]
    r = RELATIONS.index(relation)
    strength = float(relation_strength(offset, sizes)[r] + relation_strength(offset, 0 * sizes)[r]) / 2
    return 1 / (1 + math.exp((RELATION_THRESHOLD - strength) / 0.2))
