"""Roles stepped by Lightning's manual optimization, on one device or with DDP."""

from __future__ import annotations

from collections.abc import Mapping

import lightning.pytorch as pl
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from gdmd_lightning.engines.base import Engine
from gdmd_lightning.roles import Roles


class LightningEngine(Engine):
    """The steps of one update of a module that a trainer is fitting.

    Args:
        module: The module.
        roles: Its roles.
        optimizers: The optimizer of each trained role, in Lightning's wrapper.
    """

    def __init__(self, module: pl.LightningModule, roles: Roles, optimizers: Mapping[str, LightningOptimizer]) -> None:
        super().__init__(roles)
        self.module, self.optimizers = module, optimizers
        self._counted = False

    def zero_grad(self, role: str) -> None:
        self.optimizers[role].zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        self.module.manual_backward(loss)

    def step(self, role: str) -> None:
        """Step so that the trainer counts one step per update.

        Lightning counts every step taken through its wrapper as one of ``max_steps``. The strategy's own call, which
        that wrapper makes too, is not counted.
        """
        optimizer = self.optimizers[role]
        self.module.clip_gradients(optimizer.optimizer, self.roles.optimization_of(role).gradient_clip, "norm")
        if self._counted:
            self.module.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None, self.module)
        else:
            optimizer.step()
            self._counted = True
