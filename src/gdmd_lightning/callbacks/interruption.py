"""SIGINT and SIGTERM end a run after the current update, with a checkpoint that resumes exactly."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def interrupted_checkpoint(trainer: pl.Trainer) -> Path:
    """Path of the checkpoint that :class:`StopOnSignal` writes."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"


class StopOnSignal(pl.Callback):
    """On the first SIGINT or SIGTERM, finish the update, save ``interrupted.ckpt`` and stop; on a second, stop at once.

    Its handlers are installed after Lightning installs its own SIGTERM handler and removed before Lightning removes
    that one. Lightning's handler would end the run without a checkpoint.

    Attributes:
        received: Number of the signal, or 0. The command line exits with ``128 + received``.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, which Python allows in the main thread only."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            raise SystemExit(128 + number)
        self.received = number
        rank_zero_info(f"{signal.Signals(number).name}: stopping after this update, with a checkpoint")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any rank received a signal."""
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            trainer.save_checkpoint(interrupted_checkpoint(trainer))
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the previous handlers."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
