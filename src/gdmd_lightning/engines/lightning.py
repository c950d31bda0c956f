"""Roles stepped by Lightning's manual optimization, on one device or with DDP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gdmd_lightning.engines.base import Engine

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule


class LightningEngine(Engine):
    """The steps of one update of a module that a trainer is fitting.

    Args:
        module: The module; it has one optimizer per trained role.
    """

    def __init__(self, module: RoleModule) -> None:
        super().__init__(module.roles)
        self.module = module
        self._counted = False

    def zero_grad(self, role: str) -> None:
        self.module.optimizer_of(role).zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        self.module.manual_backward(loss)

    def step(self, role: str) -> None:
        """Step so that the trainer counts one step per update.

        Lightning counts every step taken through its wrapper as one of ``max_steps``. The strategy's own call, which
        that wrapper makes too, is not counted.
        """
        optimizer = self.module.optimizer_of(role)
        self.module.clip_gradients(optimizer, self.module.optimization_of(role).gradient_clip, "norm")
        if self._counted:
            self.module.trainer.strategy.optimizer_step(optimizer.optimizer, lambda: None, self.module)
        else:
            optimizer.step()
            self._counted = True
