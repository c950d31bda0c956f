"""Hand-made scenes, and interpolation between their pictures."""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import COLORS, SHAPES, contents, corrupt, describe, prompts
from gdmd_lightning.shapes.scenes import MAX_OBJECTS, Scenes, render, sample_scenes

Object = tuple[str, str, float, float, float]
"""Shape, color, x, y and radius."""


def picture(*objects: Object) -> Tensor:
    """One scene, ``[1, 3, 32, 32]``."""
    shape, color = np.full((1, MAX_OBJECTS), -1), np.zeros((1, MAX_OBJECTS), dtype=int)
    center, radius = np.zeros((1, MAX_OBJECTS, 2)), np.ones((1, MAX_OBJECTS))
    for i, (kind, paint, x, y, size) in enumerate(objects):
        shape[0, i], color[0, i] = SHAPES.index(kind), COLORS.index(paint)
        center[0, i], radius[0, i] = (x, y), size
    return render(Scenes(shape, color, center, radius))


def blend(start: Tensor, end: Tensor, shares: Tensor) -> Tensor:
    """Linear interpolation between two pictures, ``[len(shares), 3, 32, 32]``."""
    shares = shares.view(-1, 1, 1, 1)
    return (1 - shares) * start + shares * end


def asking(content: dict[str, Any]) -> Prompt:
    """The prompt of a content."""
    return Prompt(describe(content), content)


def content_of(task: str, caption: str) -> dict[str, Any]:
    """The content of a task with this caption."""
    return next(content for content in contents(task) if describe(content) == caption)


def drawn(task: str, split: str, count: int, seed: int = 0) -> tuple[list[Prompt], Tensor]:
    """``count`` prompts of a task, repeated in turn, and a true picture of each."""
    pool = prompts(task, split)  # type: ignore[arg-type]
    chosen = [pool[i % len(pool)] for i in range(count)]
    return chosen, render(sample_scenes([prompt.metadata for prompt in chosen], np.random.default_rng(seed)))


def otherwise(asked: Sequence[Prompt], seed: int = 0) -> list[Prompt]:
    """For each prompt a different valid content that ``corrupt`` can make from it.

    Contents that name a class twice are skipped. A corrupted count gets an ``exclude`` clause, because
    without one a picture of three circles is also a correct picture of "two circles".
    """
    rng, out = random.Random(seed), []
    for prompt in asked:
        clauses = prompt.metadata["include"]
        while True:
            wrong = corrupt(prompt.metadata, rng)
            if len({clause["class"] for clause in wrong["include"]}) == len(clauses):
                break
        exclude = [{**clause, "count": clause["count"] + 1} for clause in wrong["include"][:1]]
        out.append(asking({**wrong, "exclude": exclude if prompt.metadata["exclude"] else []}))
    return out
