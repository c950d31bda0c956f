"""Refuses a ``ModelCheckpoint`` that would not keep the best checkpoint by a score, however good its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from gdmd_lightning.errors import UserError


def check_monitors(trainer: pl.Trainer, scores: Mapping[str, Sequence[str]], every_n_updates: int) -> None:
    """Fail if a ``ModelCheckpoint`` monitors one of these scores, but saves at other updates than those that they have.

    Or if it monitors a task that such a score does not have: Lightning would save nothing at all.

    By default it saves at the end of an epoch, which is the end of the run. Between two evaluations it would keep
    weights under a score that is not theirs.

    Args:
        trainer: The trainer.
        scores: Tasks by the name of the score, all computed at the same updates.
        every_n_updates: Updates between two evaluations of them.

    Raises:
        UserError: If one does.
    """
    figures = tuple(f"{kind}/{score}/" for score in scores for kind in ("eval", "teacher"))
    for keeper in trainer.checkpoint_callbacks:
        if not isinstance(keeper, ModelCheckpoint) or not (keeper.monitor or "").startswith(figures):
            continue
        known = [f"{score}/{task}" for score, tasks in scores.items() for task in tasks]
        if (keeper.monitor or "").partition("/")[2] not in known:
            raise UserError(
                f"nothing computes {keeper.monitor!r}",
                where="ModelCheckpoint.monitor",
                remedy=f"use eval/ or teacher/ and one of {', '.join(known)}",
            )
        interval = keeper._every_n_train_steps
        if not interval or interval % every_n_updates:
            saves = f"saves every {interval} updates" if interval else "has no every_n_train_steps"
            raise UserError(
                f"it {saves}, and {keeper.monitor!r} is computed every {every_n_updates}",
                where="ModelCheckpoint.monitor",
                remedy=f"set its every_n_train_steps to {every_n_updates} or a multiple of it",
            )
