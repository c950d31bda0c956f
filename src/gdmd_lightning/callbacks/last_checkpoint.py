"""Saves the last update of a run in ``last.ckpt``."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint


class SaveLastUpdate(pl.Callback):
    """Saves ``last.ckpt`` at the end of a run for every ``ModelCheckpoint(save_last=True)``.

    ``ModelCheckpoint`` alone saves at its interval, so the updates after that would be lost.
    """

    def __init__(self) -> None:
        self._saved_at = -1

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember that this update is saved, under any name."""
        self._saved_at = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save unless the last update is saved already."""
        if self._saved_at == trainer.global_step:
            return
        for keeper in trainer.checkpoint_callbacks:
            # A ModelCheckpoint that has not saved yet will do so itself at the end of training.
            if isinstance(keeper, ModelCheckpoint) and keeper.save_last and keeper.last_model_path:
                trainer.save_checkpoint(keeper.last_model_path, keeper.save_weights_only)
