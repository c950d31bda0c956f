"""A graded version of GenEval's verdict, for training: how much of what a prompt asks for a picture shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gdmd_lightning.geneval.rules import OFFICIAL, Detection, Rules, counted, relations


def partial_score(detections: Sequence[Detection], metadata: Mapping[str, Any], rules: Rules = OFFICIAL) -> float:
    """Mean over all requirements of the share to which each holds; 1 exactly if the verdict is correct.

    The requirements of an ``include`` clause are its count (share of the objects asked for that were found), its color
    (share of them with that color), and its position (share of the pairs of object and landmark in that relation).
    An ``exclude`` clause loses ``1 / count`` for each surplus object, and is multiplied by the mean of the others,
    so that a picture without any object has a score of 0.

    Args:
        detections, metadata, rules: As for :func:`gdmd_lightning.geneval.rules.verdict`.

    Returns:
        A number in [0, 1].
    """
    by_class = counted(detections, metadata, rules)
    shares: list[float] = []
    groups: list[list[Detection]] = []
    for clause in metadata["include"]:
        objects, count, color = by_class.get(clause["class"], []), clause["count"], clause.get("color")
        group = objects[:count]
        shares.append(len(group) / count)
        if color is not None:
            colored = [found for found in (objects if rules.color_first else group) if found.color == color][:count]
            shares.append(len(colored) / count)
            group = colored if rules.color_first else group
        groups.append(group)
    for clause, group in zip(metadata["include"], groups, strict=True):
        if "position" in clause:
            relation, landmark = clause["position"]
            held = sum(
                relation in relations(found.box, other.box, rules.position_threshold)
                for found in group
                for other in groups[landmark]
            )
            shares.append(held / (clause["count"] * metadata["include"][landmark]["count"]))
    included = sum(shares) / len(shares)
    for clause in metadata.get("exclude", []):
        surplus = max(len(by_class.get(clause["class"], [])) - clause["count"] + 1, 0)
        shares.append(included * max(1 - surplus / clause["count"], 0.0))
    return sum(shares) / len(shares)
