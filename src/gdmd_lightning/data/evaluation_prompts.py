"""The fixed prompts of an evaluation."""

from __future__ import annotations

from itertools import islice

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt


def read_evaluation_prompts(source: str, count: int) -> list[Prompt]:
    """Read the fixed prompts of an evaluation: of Shapes equally many per task, of GenEval spread over all 553.

    Args:
        source: ``shapes`` for its held-out prompts, ``geneval`` for the official ones, or a source as in
            :func:`gdmd_lightning.data.readers.open_source`, of which the first prompts are read.
        count: Number of prompts; a source with fewer gives all it has.

    Raises:
        UserError: If the source is broken, or ``count`` is not a multiple of Shapes' six tasks.
    """
    if source == "geneval":
        from gdmd_lightning.data.readers import open_source

        # They are sorted by task: the first ones would be of one task only.
        official = list(open_source(source, split="test").read(0))
        count = min(count, len(official))
        return [official[i * len(official) // count] for i in range(count)]
    if source != "shapes":
        from gdmd_lightning.data.readers import open_source

        return list(islice(open_source(source).read(0), count))
    from gdmd_lightning.shapes.captions import TASKS, evaluation_prompts

    if count % len(TASKS):
        raise UserError(
            f"{count} prompts",
            where="evaluation count",
            remedy=f"use a multiple of {len(TASKS)}, the number of tasks",
        )
    return evaluation_prompts(count // len(TASKS))
