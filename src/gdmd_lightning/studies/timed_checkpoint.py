"""The last checkpoint of an arm, saved at intervals of time, with the seconds of training up to it."""

from __future__ import annotations

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

EVERY = 600.0  # seconds; a save of many GB takes about one minute


class TimedCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` every ten minutes and at the end, with what all updates in it took.

    Lightning's own interval of time has no effect under manual optimization. It needs :class:`SaveLastUpdate`, as every
    run of ``fit`` has it.

    Args:
        seconds: Seconds of the updates before this training; None if they are not known.

    Attributes:
        saving: Seconds of the saves at intervals, which are no part of the method's own.
    """

    def __init__(self, seconds: float | None = 0.0) -> None:
        super().__init__(save_last=True, save_top_k=0)
        self.saving = 0.0
        self._before = seconds
        self._began = self._saved = time.perf_counter()

    @property
    def state_key(self) -> str:
        """The name of its state in checkpoints."""
        return type(self).__name__

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, with the seconds of all updates so far."""
        here = time.perf_counter() - self._began - self.saving
        return {**super().state_dict(), "seconds": None if self._before is None else self._before + here}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time to; rank 0 decides, since all of them must save together."""
        began = time.perf_counter()
        if not trainer.strategy.broadcast(began - self._saved >= EVERY):
            return
        self._save_checkpoint(trainer, self.last_model_path)
        self._saved = time.perf_counter()
        self.saving += self._saved - began


def seconds_in(checkpoint: dict[str, Any]) -> float | None:
    """Seconds of all updates in a checkpoint; None if they are not known, as in one of an earlier version."""
    state = checkpoint.get("callbacks", {}).get(TimedCheckpoint.__name__, {})
    found = state.get("seconds")
    return found if isinstance(found, float) else None
