"""A callback that ends its process; configurations name it ``dying.DyingRank``."""

import os
import signal
from pathlib import Path

import lightning.pytorch as pl


class DyingRank(pl.Callback):
    """After ``updates`` updates one rank raises an error, or kills its process; once per ``directory``.

    Args:
        directory: Where it leaves a file ``died`` just before, and each start ``started-<rank>-<updates>``.
        updates: Number of updates.
        rank: The rank.
        kill: Whether it is killed with SIGKILL.
    """

    def __init__(self, directory: str, updates: int = 3, rank: int = 1, kill: bool = True) -> None:
        self.directory, self.updates, self.rank, self.kill = Path(directory), updates, rank, kill

    def on_train_start(self, trainer, pl_module) -> None:
        (self.directory / f"started-{trainer.global_rank}-{pl_module.updates}").touch()

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        died = self.directory / "died"
        if pl_module.updates != self.updates or trainer.global_rank != self.rank or died.exists():
            return
        died.touch()
        if self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("this rank dies")
