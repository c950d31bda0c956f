"""Which figures there are to monitor or watch, and who logs them; an unknown one is refused instead of ignored."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.variety import GenerationVariety
from gdmd_lightning.errors import UserError, listed
from gdmd_lightning.methods.lightning import RoleModule

Source = GenerationEvaluation | GenerationVariety
SOURCES: dict[str, type[Source]] = {
    "eval/": GenerationEvaluation,
    "teacher/": GenerationEvaluation,
    "variety/": GenerationVariety,
}
"""Which callback logs the figures with a prefix."""


def source_of(figure: str) -> type[Source] | None:
    """The callback that logs a figure; None if it is of the method, or of a callback of the user's."""
    return next((kind for prefix, kind in SOURCES.items() if figure.startswith(prefix)), None)


def no_figure(figure: str, where: str, update: int, logged: Iterable[str]) -> UserError:
    """The error for a figure that nothing has logged by the update at which it is needed."""
    return UserError(
        f"no figure {figure!r} has been logged by update {update}",
        where=where,
        remedy=f"there are {listed(sorted(logged), 40)}",
    )


class CheckMonitors(pl.Callback):
    """Fails if a ``ModelCheckpoint`` monitors a figure that is not there: it would save nothing, without a word.

    That is known when it is first due: at its interval, and once the evaluation that logs the figure has run. One that
    saves at the end only is checked at the first update if it monitors a figure of the method, which are all there by
    then. At the end of a run, the error comes after everything else is saved.
    """

    def __init__(self) -> None:
        self._first = 0
        self._unchecked: list[ModelCheckpoint] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start over: a resumed run has logged nothing yet."""
        assert isinstance(pl_module, RoleModule)
        self._first = pl_module.updates
        keepers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
        self._unchecked = [each for each in keepers if each.monitor is not None]

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Check what is due, before it is lost; not in the last update, which is still to be saved."""
        if self._unchecked and not _ended(trainer):
            self._check(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check what was due in the last update; everything is saved by now."""
        if self._unchecked and _ended(trainer):
            self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, RoleModule)
        updates = pl_module.updates
        for keeper in [each for each in self._unchecked if self._is_due(trainer, updates, each)]:
            self._unchecked.remove(keeper)
            figure, logged = str(keeper.monitor), keeper._monitor_candidates(trainer)
            if not trainer.strategy.broadcast(figure in logged):  # some are logged on rank 0 only
                raise no_figure(figure, "ModelCheckpoint.monitor", updates, logged)

    def _is_due(self, trainer: pl.Trainer, updates: int, keeper: ModelCheckpoint) -> bool:
        """Whether it should have saved in this run, and its figure been logged."""
        figure = str(keeper.monitor)
        due = [keeper._every_n_train_steps or (1 if figure.startswith("train/") else trainer.max_steps)]
        if (kind := source_of(figure)) is not None:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            due += [each.every_n_updates for each in callbacks if isinstance(each, kind)]
        return all(each > 0 and updates // each > self._first // each for each in due)


def _ended(trainer: pl.Trainer) -> bool:
    return bool(trainer.global_step >= trainer.max_steps > 0)
