"""A warning when a reward has had no effect for a while."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from gdmd_lightning.methods.record import JudgedTargets

PATIENCE = 20
"""Updates in a row without any spread before a warning."""


class WarnWithoutSpread(pl.Callback):
    """Warns once if the members of every group had equal rewards for :data:`PATIENCE` updates in a row.

    The number of these updates is kept on the device and read every :data:`PATIENCE` updates, so that updates do not
    wait for it. ``train/groups_without_spread`` is the share of such groups.
    """

    def __init__(self) -> None:
        self._warned = False
        self._seen = 0
        self._flat: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count this update."""
        judged = outputs["record"]
        unused = isinstance(judged, JudgedTargets) and judged.lambda_policy == 0
        share = outputs["logs"].get("groups_without_spread")
        if self._warned or unused or share is None:
            return
        before = torch.zeros_like(share) if self._flat is None else self._flat
        self._flat = torch.where(share == 1, before + 1, 0)
        self._seen += 1
        if self._seen % PATIENCE == 0 and float(self._flat) >= PATIENCE:
            self._warned = True
            rank_zero_warn(
                f"The reward has had no effect for {int(self._flat)} updates: the members of each group got equal "
                "rewards (train/groups_without_spread is 1). Use a finer reward, or larger groups."
            )
