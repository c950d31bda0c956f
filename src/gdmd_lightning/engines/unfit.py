"""What Lightning's trainer takes but manual optimization, or a run without epochs, leaves without effect."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from gdmd_lightning.errors import UserError

AVERAGE = "use model.ema_decay: the generator's average is evaluated and exported"
UNFIT: dict[type[pl.Callback], tuple[str, str]] = {
    GradientAccumulationScheduler: ("an update takes several optimizer steps", "use model.accumulate"),
    LearningRateFinder: ("it knows one optimizer, and each role has its own", "set the learning rate of each role"),
    BatchSizeFinder: (
        "an update keeps its size whatever it finds",
        "set data.batch_size, and model.micro_batch_size for what fits in memory; plan tells which",
    ),
    BackboneFinetuning: ("a method's networks are its roles, without a backbone", "use model.lora"),
    StochasticWeightAveraging: ("it knows one optimizer, and each role has its own", AVERAGE),
    WeightAveraging: ("it averages all roles, and its checkpoints can be neither resumed nor exported", AVERAGE),
    SpikeDetection: (
        "it needs a single loss, and each role has its own",
        "use CollapseWatch, and model.non_finite for NaN",
    ),
    ModelPruning: ("it prunes layers that are there before the networks are loaded", "remove it"),
}
"""Callbacks of Lightning that fail, have no effect or break checkpoints: why, and what to do instead."""


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
            remedy="use a data.source that has only the prompts to overfit",
        )
    # Lightning sets 1000 if neither max_epochs nor max_steps nor max_time is given.
    if endless and not _has_epochs(trainer) and (trainer.max_epochs or 0) > 0:
        raise UserError(
            f"it is {trainer.max_epochs}, but prompts go on as they come: the only epoch is the whole run",
            where="trainer.max_epochs",
            remedy="set trainer.max_steps and leave it at -1, or give epochs a length with trainer.limit_train_batches",
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not type(callback).on_train_batch_end.__module__.startswith("lightning."):
            continue
        for kind, (why, remedy) in UNFIT.items():
            if isinstance(callback, kind):
                raise UserError(why, where=type(callback).__name__, remedy=remedy)
        if endless and isinstance(callback, EarlyStopping) and not _looks(trainer, callback):
            raise UserError(
                "it looks at its figure when an epoch ends, and the only epoch is the whole run",
                where=type(callback).__name__,
                remedy="use CollapseWatch with policy: stop, or EvaluationBudget",
            )
        if endless and isinstance(callback, Timer) and callback._interval == "epoch" and not _has_epochs(trainer):
            raise UserError(
                "it looks at the time when an epoch ends, and the only epoch is the whole run",
                where=f"{type(callback).__name__}.interval",
                remedy="use step",
            )
        if isinstance(callback, ModelCheckpoint) and callback._train_time_interval is not None:
            raise UserError(
                "Lightning saves at intervals of time under automatic optimization only, so nothing until the run ends",
                where="ModelCheckpoint.train_time_interval",
                remedy="use every_n_train_steps, a number of updates",
            )


def _has_epochs(trainer: pl.Trainer) -> bool:
    """Whether an epoch ends before the run does, of prompts without an end."""
    return isinstance(trainer.limit_train_batches, int)


def _looks(trainer: pl.Trainer, callback: EarlyStopping) -> bool:
    """Whether epochs end, and the callback looks then; a run has no validation."""
    looks = callback._check_on_train_epoch_end
    if looks is None:  # Lightning decides so in its setup
        looks = trainer.val_check_interval == 1.0 and trainer.check_val_every_n_epoch == 1
    return looks and _has_epochs(trainer)
