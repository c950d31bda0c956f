"""Keeps ``last.ckpt`` the last: one file under this name, and the last update of a run in it."""

from __future__ import annotations

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class SaveLastUpdate(pl.Callback):
    """Saves ``last.ckpt`` at the end of a run for every ``ModelCheckpoint(save_last=True)``.

    ``ModelCheckpoint`` alone saves at its interval, so the updates after that would be lost. Where a ``last.ckpt``
    exists, it would also save ``last-v1.ckpt`` next to it and leave the first one old. In a ``fast_dev_run`` nothing is
    saved.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Make every ``ModelCheckpoint`` overwrite its ``last.ckpt``; also one of an earlier run that is resumed."""
        for keeper in _keepers(trainer):
            if trainer.fast_dev_run:  # type: ignore[attr-defined]
                keeper.save_last = False  # Lightning suppresses all checkpoints of such a run but this one
            name = keeper.CHECKPOINT_NAME_LAST
            if "{" not in name:  # a name with metrics is different in every update
                keeper.last_model_path = keeper.format_checkpoint_name({}, name)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save every ``last.ckpt`` that does not have the last update."""
        # A ModelCheckpoint that saves at the end of training itself does so after this, with nothing left to do.
        current = {k.last_model_path for k in _keepers(trainer) if k._last_global_step_saved == trainer.global_step}
        for keeper in _keepers(trainer):
            if keeper.last_model_path and keeper.last_model_path not in current:
                keeper._save_checkpoint(trainer, keeper.last_model_path)
                current.add(keeper.last_model_path)


def _keepers(trainer: pl.Trainer) -> list[ModelCheckpoint]:
    return [k for k in trainer.checkpoint_callbacks if isinstance(k, ModelCheckpoint) and k.save_last]
