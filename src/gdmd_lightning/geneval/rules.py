"""GenEval's rules: does a picture, given as detected objects, show what a prompt's metadata asks for?

The rules do not depend on a detector. Metadata is a line of GenEval's prompt file: ``tag``, ``include``
clauses (``class``, ``count``, optional ``color``, optional ``position`` as ``[relation, index of another
clause]``) and optional ``exclude`` clauses (``class``, ``count``).

Source: GenEval (2310.11513); djghosh13/geneval, ``evaluation/evaluate_images.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdmd_lightning.ranges import Count, Fraction, OpenLow, ranged

RELATIONS = ("left of", "right of", "above", "below")
RELATION_THRESHOLD = 0.5  # a relation holds if its strength is greater

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge in pixels; y points down."""


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Args:
        label: Class name, as in the metadata.
        box: Left, top, right and bottom edge in pixels.
        score: Confidence in [0, 1].
        color: Color name, as in the metadata; ``None`` if the detector did not classify it.
    """

    label: str
    box: Box
    score: float
    color: str | None = None


@ranged
@dataclass(frozen=True)
class Rules:
    """Settings of the rules; the defaults are GenEval's own.

    Args:
        score_threshold: Only objects with a higher score count.
        counting_threshold: The same for prompts with the tag ``counting``.
        max_per_class: At most this many objects per class count, those with the highest scores.
        max_overlap: An object whose box overlaps that of a more confident one of its class by this intersection over
            union, or more, does not count; 1 counts all.
        position_threshold: Share of the summed sizes of two objects by which the offset between them is
            shortened.
        color_first: Whether a clause with a color takes the most confident objects of that color. If not,
            it takes the most confident objects of any color and requires all of them to have that color.
    """

    score_threshold: Fraction = 0.3
    counting_threshold: Fraction = 0.9
    max_per_class: Count = 16
    max_overlap: OpenLow = 1.0
    position_threshold: Fraction = 0.1
    color_first: bool = False


OFFICIAL = Rules()


@dataclass(frozen=True)
class Verdict:
    """Whether a picture is correct, and if not, why: one line per clause that does not hold."""

    correct: bool
    reason: str = ""


def verdict(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules = OFFICIAL) -> Verdict:
    """Judge one picture: correct if every ``include`` clause holds and no ``exclude`` clause does.

    Args:
        detections: All objects found in the picture, in any order; of objects of a class with equal scores the later
            ranks first, as in the original.
        metadata: What the prompt asks for, in GenEval's form.
        rules: Thresholds and the order of color and count.
    """
    by_class = counted(detections, metadata, rules)
    groups: list[list[Detection] | None] = []  # the objects of each include clause, None if it does not hold
    reasons: list[str] = []
    for clause in metadata["include"]:
        group, reason = _matching(by_class.get(clause["class"], []), clause, rules)
        groups.append(group)
        reasons += reason
    for clause, group in zip(metadata["include"], groups, strict=True):
        if "position" in clause and group is not None:
            relation, landmark = clause["position"]
            reasons += _misplaced(clause["class"], relation, group, groups[landmark], rules)
    for clause in metadata.get("exclude", []):
        found = len(by_class.get(clause["class"], []))
        if found >= clause["count"]:
            reasons.append(f"expected fewer than {clause['count']} {clause['class']}, found {found}")
    return Verdict(not reasons, "\n".join(reasons))


def relation_strength(offset: np.ndarray, sizes: np.ndarray, position_threshold: float = 0.1) -> np.ndarray:
    """How firmly each of ``RELATIONS`` holds; it holds if its strength is above ``RELATION_THRESHOLD``.

    With ``d = sign(offset) * max(|offset| - position_threshold * sizes, 0)`` the strengths of "right of"
    and "below" are the components of ``d / |offset|``, or 0 if both components of ``d`` are less than 0.001
    pixels.

    Args:
        offset: Center of the object minus center of its landmark, ``[..., 2]`` pixels, y down.
        sizes: Width and height of the object plus those of its landmark, ``[..., 2]`` pixels.
        position_threshold: Share of ``sizes`` by which the offset is shortened.

    Returns:
        ``[..., 4]`` in [-1, 1], in the order of ``RELATIONS``.
    """
    d = np.sign(offset) * np.maximum(np.abs(offset) - position_threshold * sizes, 0.0)
    d = np.where((np.abs(d) < 1e-3).all(-1, keepdims=True), 0.0, d)
    x, y = np.moveaxis(d / np.maximum(np.linalg.norm(offset, axis=-1, keepdims=True), 1e-6), -1, 0)
    return np.stack([-x, x, -y, y], axis=-1)


def relations(box: Box, landmark: Box, position_threshold: float = 0.1) -> set[str]:
    """Relations of an object to its landmark: none, one, or two on a diagonal."""
    corners, others = np.reshape(box, (2, 2)), np.reshape(landmark, (2, 2))
    sizes = np.abs(corners[1] - corners[0]) + np.abs(others[1] - others[0])
    strengths = relation_strength(corners.mean(0) - others.mean(0), sizes, position_threshold)
    return {name for name, strength in zip(RELATIONS, strengths, strict=True) if strength > RELATION_THRESHOLD}


def counted(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules) -> dict[str, list[Detection]]:
    """The objects that count, by class, most confident first."""
    threshold = rules.counting_threshold if metadata.get("tag") == "counting" else rules.score_threshold
    # The original sorts the float32 scores of each class by `np.argsort(scores)[::-1]`, so that the later of two equal
    # ones ranks first. With its NumPy (1.23) that is the stable order for up to 16 scores; newer versions order equal
    # scores differently on each kind of CPU, so that the order is asked for by name here.
    scores = np.array([found.score for found in detections], dtype=np.float32)
    by_class: dict[str, list[Detection]] = {}
    for row in np.argsort(scores, kind="stable")[::-1].tolist():
        objects = by_class.setdefault(detections[row].label, [])
        if scores[row] > threshold and len(objects) < rules.max_per_class:
            objects.append(detections[row])
    if rules.max_overlap == 1:
        return by_class
    return {label: _apart(objects, rules.max_overlap) for label, objects in by_class.items()}


def _apart(objects: list[Detection], max_overlap: float) -> list[Detection]:
    """The objects, without those that overlap a more confident one that is kept."""
    kept: list[Detection] = []
    for found in objects:
        if all(overlap(found.box, other.box) < max_overlap for other in kept):
            kept.append(found)
    return kept


def overlap(box: Box, other: Box) -> float:
    """Intersection over union of two boxes whose right and bottom edges are pixels of theirs, as in GenEval."""
    shared = _area((max(box[0], other[0]), max(box[1], other[1]), min(box[2], other[2]), min(box[3], other[3])))
    union = _area(box) + _area(other) - shared
    return shared / union if union else 0.0


def _area(box: Box) -> float:
    return max(box[2] - box[0] + 1, 0) * max(box[3] - box[1] + 1, 0)


def _matching(
    objects: list[Detection], clause: Mapping[str, Any], rules: Rules
) -> tuple[list[Detection] | None, list[str]]:
    """The objects that fulfill a clause's class, count and color, or ``None`` and the reason."""
    name, count, color = clause["class"], clause["count"], clause.get("color")
    if color is not None and rules.color_first:
        objects = [found for found in objects if found.color == color]
    group = objects[:count]
    if len(group) < count:
        what = f"{color} {name}" if color is not None and rules.color_first else name
        return None, [f"expected {count} {what}, found {len(group)}"]
    if color is not None and any(found.color != color for found in group):
        colors = ", ".join(str(found.color) for found in group)
        return None, [f"expected {count} {color} {name}, found {colors}"]
    return group, []


def _misplaced(
    name: str, relation: str, group: list[Detection], landmarks: list[Detection] | None, rules: Rules
) -> list[str]:
    """The reason why a relation does not hold between all pairs; empty if it does."""
    if landmarks is None:
        return [f"no landmark for {name} to be {relation}"]
    for found in group:
        for landmark in landmarks:
            held = relations(found.box, landmark.box, rules.position_threshold)
            if relation not in held:
                return [
                    f"expected {name} {relation} {landmark.label}, found {' and '.join(sorted(held)) or 'no relation'}"
                ]
    return []
