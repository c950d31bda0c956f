"""The fixed prompts of an evaluation."""

from __future__ import annotations

from itertools import islice

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt


def read_test_prompts(source: str, count: int) -> list[Prompt]:
    """The first ``count`` prompts of a file, or Shapes' held-out ones, as many of each task.

    Raises:
        UserError: If the source is broken, or Shapes' six tasks do not divide ``count``.
    """
    if source != "shapes":
        from gdmd_lightning.data.readers import open_source

        return list(islice(open_source(source).read(0), count))
    from gdmd_lightning.shapes.captions import TASKS, evaluation_prompts

    if count % len(TASKS):
        raise UserError(
            f"{count} prompts", where="evaluation count", remedy=f"use a multiple of {len(TASKS)}, one share a task"
        )
    return evaluation_prompts(count // len(TASKS))
