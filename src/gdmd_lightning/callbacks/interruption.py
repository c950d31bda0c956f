"""SIGINT and SIGTERM end a run after the update at hand, with a checkpoint that resumes exactly."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_info


def interrupted_checkpoint(trainer: pl.Trainer) -> Path:
    """Where :class:`StopOnSignal` saves."""
    return Path(trainer.log_dir or trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"


class StopOnSignal(pl.Callback):
    """On the first SIGINT or SIGTERM, finish the update, save ``interrupted.ckpt`` and stop; on a second, stop at once.

    It listens between the hooks in which Lightning installs its own handler of SIGTERM and takes it away again: that
    one would end the run without a checkpoint and, left in place, make the process deaf to SIGTERM after the run.

    Attributes:
        received: The signal's number, or 0. The command line exits with ``128 + received``.
    """

    def __init__(self) -> None:
        self.received = 0
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Listen; a run inside another program's thread leaves the signals to that program."""
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
        """Save and stop if a signal came on any rank."""
        if trainer.strategy.reduce_boolean_decision(bool(self.received), all=False):
            trainer.save_checkpoint(interrupted_checkpoint(trainer))
            trainer.should_stop = True

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back."""
        self._give_back()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Give the signals back."""
        self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
