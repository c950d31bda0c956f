"""SIGINT, SIGTERM, SIGHUP and SLURM's warning end a run after the current update, with a checkpoint to resume from."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from gdmd_lightning.callbacks.run_directory import CHECKPOINTS, run_directory

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_STOP = 1.0  # seconds


def interrupted_checkpoint(trainer: pl.Trainer) -> Path:
    """Path of the checkpoint that :class:`StopOnSignal` writes."""
    return run_directory(trainer) / CHECKPOINTS / "interrupted.ckpt"


class StopOnSignal(pl.Callback):
    """On the first signal, finish the update, save ``interrupted.ckpt`` and stop; on a second, stop at once.

    Those within a second of the first are the same stop: one may reach a group of processes and be passed on there.

    A signal to any rank stops all of them after the same update. The handlers replace Lightning's, which would end
    the run without a checkpoint, and stay until the last checkpoint of the run is written. Under SLURM the signal of
    ``SLURMEnvironment.requeue_signal``, SIGUSR1, is one of them: Lightning's handler saves in the middle of an update.

    An update that ends with an evaluation can last long: the evaluation calls :meth:`save_early`.

    It must be the last callback: its checkpoint has the states of all others after the update, also that of a
    ``ModelCheckpoint`` that saves in it.

    Attributes:
        received: Number of the signal, or 0; after the run it is the same on all ranks. The command line exits with
            ``128 + received``.
        stopped: Whether the signal ended the run before its last update.
    """

    def __init__(self) -> None:
        self.received = 0
        self.stopped = False
        self._saved_early = False
        self._first = 0.0
        self._previous: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remember the handlers before Lightning installs its own, and let it install none for SLURM's signal."""
        numbers = list(SIGNALS)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment):
            environment.auto_requeue = False
            numbers += [environment.requeue_signal or signal.SIGUSR1]
        self._previous = {number: signal.getsignal(number) for number in numbers}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers, which Python allows in the main thread only."""
        if threading.current_thread() is not threading.main_thread():
            self._previous.clear()
        for number, previous in self._previous.items():
            # nohup ignores SIGHUP, so that a run survives the end of its terminal.
            if number != signal.SIGHUP or previous != signal.SIG_IGN:
                signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received:
            if time.monotonic() - self._first < SAME_STOP:
                return
            raise SystemExit(128 + number)
        self.received, self._first = number, time.monotonic()
        rank_zero_info(f"{signal.Signals(number).name}: stopping after this update, with a checkpoint")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any rank received a signal."""
        if self._agreed(trainer):
            self.stopped = trainer.global_step < trainer.max_steps or trainer.max_steps < 0
            trainer.save_checkpoint(interrupted_checkpoint(trainer), weights_only=False)
            trainer.should_stop = True
            # Lightning would go on until both are reached.
            trainer.fit_loop.epoch_loop.min_steps, trainer.fit_loop.min_epochs = None, 0

    def save_early(self, trainer: pl.Trainer) -> None:
        """Save, once, if any rank received a signal, without waiting for what is left to do after the update.

        Whoever sent the signal may not wait for that; the checkpoint after the update replaces this one. All ranks must
        call it.
        """
        if not self._saved_early and self._agreed(trainer):
            self._saved_early = True
            trainer.save_checkpoint(interrupted_checkpoint(trainer), weights_only=False)

    def _agreed(self, trainer: pl.Trainer) -> int:
        """The signal that a rank received, on all ranks; 0 for none."""
        if trainer.world_size > 1:
            received = torch.tensor(self.received, device=trainer.strategy.root_device)
            self.received = int(trainer.strategy.reduce(received, reduce_op="max"))
        return self.received

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Restore the previous handlers."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Restore the previous handlers."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
