"""What Lightning's trainer takes but manual optimization, or a run without epochs, leaves without effect."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from gdmd_lightning.errors import UserError


def check_fitting(trainer: pl.Trainer, *, endless: bool) -> None:
    """Fail before anything is loaded if a callback or setting of the trainer could have no effect.

    A subclass with an ``on_train_batch_end`` of its own passes: that is called after every update.

    Args:
        trainer: The trainer.
        endless: Whether the prompts have no end, so that an epoch ends only where ``limit_train_batches`` ends it.

    Raises:
        UserError: If one could not.
    """
    if endless and trainer.overfit_batches > 0:  # type: ignore[attr-defined]
        raise UserError(
            "it has no effect: prompts go on as they come, in every epoch",
            where="trainer.overfit_batches",
            remedy="use a data.source of only so many prompts",
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not type(callback).on_train_batch_end.__module__.startswith("lightning."):
            continue
        if endless and isinstance(callback, EarlyStopping) and not _looks(trainer, callback):
            raise UserError(
                "it looks at its figure when an epoch ends, and the only epoch is the whole run",
                where=type(callback).__name__,
                remedy="use CollapseWatch with policy: stop, or EvaluationBudget",
            )
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise UserError(
                "Lightning saves at intervals of time under automatic optimization only, so nothing until the run ends",
                where="ModelCheckpoint.train_time_interval",
                remedy="use every_n_train_steps, a number of updates",
            )


def _looks(trainer: pl.Trainer, callback: EarlyStopping) -> bool:
    """Whether an epoch ends before the run does, and the callback looks then; a run has no validation."""
    looks = callback._check_on_train_epoch_end
    if looks is None:  # Lightning decides so in its setup
        looks = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return looks and isinstance(trainer.limit_train_batches, int)
