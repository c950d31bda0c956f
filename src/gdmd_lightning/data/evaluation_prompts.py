"""The fixed prompts of an evaluation."""

from __future__ import annotations

from itertools import islice

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt


def read_evaluation_prompts(source: str, count: int) -> list[Prompt]:
    """Read the first prompts of a source, or Shapes' held-out prompts, equally many per task.

    Args:
        source: ``shapes``, or a source as in :func:`gdmd_lightning.data.readers.open_source`.
        count: Number of prompts; a source with fewer gives all it has.

    Raises:
        UserError: If the source is broken, or ``count`` is not a multiple of Shapes' six tasks.
    """
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
