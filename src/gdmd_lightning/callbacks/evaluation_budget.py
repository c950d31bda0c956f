"""Ends a training after a number of network evaluations, so that methods can be compared at equal cost."""

from __future__ import annotations

import lightning.pytorch as pl

from gdmd_lightning.methods.lightning import RoleModule
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.ranges import Count, ranged


@ranged
class EvaluationBudget(pl.Callback):
    """Ends the training with the first update that reaches the budget.

    Args:
        evaluations: Network evaluations of single latents, on each rank, from the start of the run; a resumed run
            continues to count.
    """

    def __init__(self, evaluations: Count) -> None:
        self.evaluations = evaluations

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take no update if the budget is spent already."""
        self._check(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: PromptBatch, batch_idx: int
    ) -> None:
        """End the training if the budget is spent."""
        self._check(trainer, pl_module)

    def _check(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert isinstance(module, RoleModule)
        if module.evaluations >= self.evaluations:
            trainer.should_stop = True
