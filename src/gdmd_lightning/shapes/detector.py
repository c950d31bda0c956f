"""The exact judge of the Shapes world: finds coloured shapes in a picture, gives GenEval's verdict and a grade.

Colour segmentation, connected components and template overlap, for a whole batch at once. The *verdict* follows
GenEval's rules (all ``include`` clauses hold, no ``exclude`` clause does); the *grade* is a smooth reward in
[0, 1] that every small gain in shape, colour, count or place moves.
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

from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import COLORS, RELATIONS, SHAPES
from gdmd_lightning.shapes.scenes import BACKGROUND, PALETTE, SIZE, coverage, relation_strength

MIN_AREA = 16.0  # pixels; the smallest rendered shape has 28
MIN_OVERLAP = 0.82  # of a component with its best template; the wrong shape reaches about 0.85 of the right one
RELATION_THRESHOLD = 0.5  # GenEval's

_COLORS = torch.tensor([BACKGROUND, *(PALETTE[name] for name in COLORS)])
# Extent of a shape of area 1: circle's radius, square's half side, triangle's circumradius.
_UNIT = torch.tensor([1 / math.sqrt(math.pi), 0.5, math.sqrt(4 / (3 * math.sqrt(3)))])
_SPECK = 6  # components below so many pixels are noise of the decoder's, not objects


@dataclass(frozen=True)
class Detections:
    """What was found in a batch of pictures, ``K`` components in all.

    Args:
        image: Which picture, ``[K]``.
        area: Soft area in pixels, ``[K]``.
        center: Centre of the bounding box, ``[K, 2]`` pixels.
        size: Width and height, ``[K, 2]`` pixels.
        overlap: Soft intersection over union with each shape's template of equal area, ``[K, 3]``.
        color: Nearest palette colour, index into ``COLORS``, ``[K]``.
        likeness: How close its mean colour is to each palette colour, ``[K, 4]`` in (0, 1].
        batch: Number of pictures.
    """

    image: np.ndarray
    area: np.ndarray
    center: np.ndarray
    size: np.ndarray
    overlap: np.ndarray
    color: np.ndarray
    likeness: np.ndarray
    batch: int

    def of(self, image: int) -> Detections:
        """The detections of one picture."""
        k = self.image == image
        return Detections(
            self.image[k], self.area[k], self.center[k], self.size[k], self.overlap[k], self.color[k],
            self.likeness[k], 1,
        )  # fmt: skip


@torch.no_grad()
def detect(images: Tensor) -> Detections:
    """Find the coloured shapes of pictures ``[N, 3, 32, 32]`` in [0, 1]."""
    images = images.detach().float().cpu().clamp(0, 1)
    n = len(images)
    distance = (images[:, None] - _COLORS[None, :, :, None, None]).square().sum(2)
    nearest = distance.argmin(1).numpy()  # [N, H, W], 0 is the background
    planes = np.stack([nearest == c for c in range(1, len(_COLORS))], axis=1)
    # One labelling for the whole batch: pixels connect within a picture and a colour only.
    structure = np.zeros((3, 3, 3, 3), dtype=bool)
    structure[1, 1] = ndimage.generate_binary_structure(2, 1)
    labels, found = ndimage.label(planes, structure)
    boxes = ndimage.find_objects(labels)
    pixels = np.bincount(labels.ravel(), minlength=found + 1)[1:]
    keep = [k for k in range(found) if pixels[k] >= _SPECK]
    image = np.array([boxes[k][0].start for k in keep], dtype=int)
    color = np.array([boxes[k][1].start for k in keep], dtype=int)
    if not keep:
        empty = np.zeros((0, 2))
        return Detections(image, np.zeros(0), empty, empty, np.zeros((0, 3)), color, np.zeros((0, 4)), n)

    own = torch.from_numpy(np.stack([labels[i, c] == k + 1 for i, c, k in zip(image, color, keep, strict=True)]))
    region = torch.nn.functional.max_pool2d(own[:, None].float(), 3, stride=1, padding=1)[:, 0]
    picture = images[torch.from_numpy(image)]
    background, paint = _COLORS[0], _COLORS[1:][torch.from_numpy(color)]
    # Coverage of each pixel: where it lies between the background's colour and the shape's.
    axis = paint - background
    alpha = (
        torch.einsum("kchw,kc->khw", picture - background[:, None, None], axis) / axis.square().sum(1)[:, None, None]
    )
    alpha = alpha.clamp(0, 1) * region
    area = alpha.sum((1, 2))
    grid = torch.arange(SIZE) + 0.5
    centroid = torch.stack([(alpha.sum(1) * grid).sum(1), (alpha.sum(2) * grid).sum(1)], dim=1) / area[:, None]

    kinds = torch.arange(len(SHAPES)).expand(len(keep), -1)
    extent = area.sqrt()[:, None] * _UNIT
    middle = centroid[:, None].expand(-1, len(SHAPES), -1)
    templates = coverage(kinds, middle, extent)
    overlap = torch.minimum(alpha[:, None], templates).sum((2, 3)) / torch.maximum(alpha[:, None], templates).sum(
        (2, 3)
    )

    weight = (alpha * own)[:, None]
    mean = (picture * weight).sum((2, 3)) / weight.sum((2, 3))
    likeness = torch.exp(-(mean[:, None] - _COLORS[1:]).square().sum(2) / (2 * 0.25**2))
    corners = np.array(
        [[(b[3].start, b[2].start), (b[3].stop, b[2].stop)] for b in (boxes[k] for k in keep)], dtype=float
    )
    return Detections(
        image, area.numpy(), corners.mean(1), corners[:, 1] - corners[:, 0], overlap.numpy(), color, likeness.numpy(), n
    )


def verdict(detections: Detections, prompts: Sequence[Prompt]) -> np.ndarray:
    """GenEval's verdict, ``[N]`` booleans: every ``include`` clause holds and no ``exclude`` clause does."""
    return np.array([_verdict(detections.of(i), prompt.metadata) for i, prompt in enumerate(prompts)], dtype=bool)


def grade(detections: Detections, prompts: Sequence[Prompt]) -> np.ndarray:
    """The smooth reward, ``[N]`` float32 in [0, 1]: half the mean and half the product of all clauses' grades."""
    return np.array([_grade(detections.of(i), prompt.metadata) for i, prompt in enumerate(prompts)], dtype=np.float32)


def _verdict(found: Detections, metadata: dict[str, Any]) -> bool:
    sure = (found.area >= MIN_AREA) & (found.overlap.max(1, initial=0) >= MIN_OVERLAP)
    kind = found.overlap.argmax(1) if len(found.area) else np.zeros(0, dtype=int)
    by_class = {
        shape: sorted(np.flatnonzero(sure & (kind == s)).tolist(), key=lambda k: -found.overlap[k].max())
        for s, shape in enumerate(SHAPES)
    }
    chosen: list[list[int]] = []
    for clause in metadata["include"]:
        objects = by_class[clause["class"]]
        if "color" in clause:  # a picture may hold the same class twice in two colours
            objects = [k for k in objects if COLORS[found.color[k]] == clause["color"]]
        if len(objects) < clause["count"]:
            return False
        chosen.append(objects[: clause["count"]])
    if any(len(by_class[clause["class"]]) >= clause["count"] for clause in metadata.get("exclude", [])):
        return False
    for clause, objects in zip(metadata["include"], chosen, strict=True):
        if "position" in clause:
            relation, landmark = clause["position"]
            pairs = [(a, b) for a in objects for b in chosen[landmark]]
            if any(_strength(found, a, b, relation) <= RELATION_THRESHOLD for a, b in pairs):
                return False
    return True


def _strength(found: Detections, one: int, landmark: int, relation: str, dead_zone: float = 1.0) -> float:
    offset = found.center[one] - found.center[landmark]
    strengths = relation_strength(offset, dead_zone * (found.size[one] + found.size[landmark]))
    return float(strengths[RELATIONS.index(relation)])


def _held(found: Detections, one: int, landmark: int, relation: str) -> float:
    """How surely a relation holds, in (0, 1): around GenEval's threshold, without the dead zone in which its rule
    sees no offset at all.
    """
    strength = (_strength(found, one, landmark, relation) + _strength(found, one, landmark, relation, 0.0)) / 2
    return 1 / (1 + math.exp((RELATION_THRESHOLD - strength) / 0.2))


def _grade(found: Detections, metadata: dict[str, Any]) -> float:
    wanted = [clause for clause in metadata["include"] for _ in range(clause["count"])]
    first = np.cumsum([0] + [clause["count"] for clause in metadata["include"]])
    if not len(found.area):
        return 0.0
    kind = np.exp((found.overlap - found.overlap.max(1, keepdims=True)) / 0.03)
    kind *= found.overlap / kind.sum(1, keepdims=True)  # how surely each shape, times how well it is drawn
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
