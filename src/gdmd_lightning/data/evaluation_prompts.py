"""The fixed prompts of an evaluation."""

from __future__ import annotations

from itertools import islice

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt

COLUMN, SPLIT = "prompt", "train"


def read_evaluation_prompts(
    source: str, count: int, *, column: str = COLUMN, split: str = SPLIT, tag: str | None = None
) -> list[Prompt]:
    """Read the fixed prompts of an evaluation: of Shapes equally many per task, of GenEval spread over all 553.

    Args:
        source: ``shapes`` for its held-out prompts, ``geneval`` for the official ones, or a source as in
            :func:`gdmd_lightning.data.readers.open_source`. Of the latter the first prompts are read; with a tag,
            prompts spread over the whole source, since published sets are sorted by it.
        count: Number of prompts; a source with fewer gives all it has.
        column, split, tag: See :func:`gdmd_lightning.data.readers.open_source`.

    Raises:
        UserError: If the source is broken, Shapes or GenEval is given a column, split or tag, or ``count`` is not a
            multiple of Shapes' six tasks.
    """
    from gdmd_lightning.data.readers import open_source

    if source in ("shapes", "geneval"):
        for name, value, default in (("column", column, COLUMN), ("split", split, SPLIT), ("tag", tag, None)):
            if value != default:
                raise UserError(f"{name} is only for files and data sets", where=source, remedy="leave it out")
    if source == "geneval":
        # They are sorted by task: the first ones would be of one task only.
        return spread(list(open_source(source, split="test").read(0)), count)
    if source != "shapes":
        opened = open_source(source, column=column, split=split, tag=tag).read(0)
        return list(islice(opened, count)) if tag is None else spread(list(opened), count)
    from gdmd_lightning.shapes.captions import TASKS, evaluation_prompts

    if count % len(TASKS):
        raise UserError(
            f"{count} prompts",
            where="evaluation count",
            remedy=f"use a multiple of {len(TASKS)}, the number of tasks",
        )
    return evaluation_prompts(count // len(TASKS))


def spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """``count`` of the prompts at equal distances, or all if there are fewer."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]
