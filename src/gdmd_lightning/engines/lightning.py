"""Roles stepped by Lightning's manual optimization, on one device or with DDP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gdmd_lightning.engines.base import Engine
from gdmd_lightning.engines.non_finite import Attempt, StepGuard
from gdmd_lightning.roles import Roles


class LightningEngine(Engine):
    """The steps of one update of a module that a trainer is fitting.

    Args:
        module: The module.
        roles: Its roles.
        optimizers: The optimizer of each trained role, in Lightning's wrapper.
        guard: Decides about steps that are not finite.
        update: Number of the update, from 1.
        prompts: Texts of its prompts.

    Attributes:
        norms: Gradient norm of each step before clipping, by role.
        skipped: Number of steps not taken.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        roles: Roles,
        optimizers: Mapping[str, LightningOptimizer],
        guard: StepGuard,
        update: int,
        prompts: tuple[str, ...],
    ) -> None:
        super().__init__(roles)
        self.module, self.optimizers, self.guard = module, optimizers, guard
        self.update, self.prompts = update, prompts
        self.norms: dict[str, list[Tensor]] = {}
        self.skipped = 0
        # Mixed precision in float16 scales losses; Lightning itself unscales gradients only after clipping.
        self.scaler: torch.amp.GradScaler | None = getattr(module.trainer.precision_plugin, "scaler", None)
        self._loss = torch.zeros(())

    def zero_grad(self, role: str) -> None:
        self.optimizers[role].zero_grad(set_to_none=True)
        self._loss = torch.zeros((), device=self.module.device)

    def backward(self, loss: Tensor) -> None:
        self._loss = self._loss + loss.detach()
        self.module.manual_backward(loss)

    def step(self, role: str) -> bool:
        optimizer = self.optimizers[role].optimizer
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        norm = self._clip(role)
        self.norms.setdefault(role, []).append(norm)
        attempt = Attempt(role, self.update, self.prompts, self._loss, norm)
        taken = not self._only_scaled_too_high(attempt) and self.guard.allows(attempt)
        if taken:
            self._apply(optimizer)
        if self.scaler is not None:
            self.scaler.update()
        self.skipped += not taken
        return taken

    def finish(self) -> None:
        """Count the update as one of the trainer's steps, whatever number of steps was taken in it.

        Lightning counts the steps that are taken through its wrappers of optimizers, so none are.
        """
        loop: Any = self.module.trainer.fit_loop
        counter = loop.epoch_loop.manual_optimization.optim_step_progress
        counter.increment_ready()
        counter.increment_completed()

    def logs(self) -> dict[str, Tensor]:
        """Mean gradient norm of each role before clipping; the number of skipped steps, if steps can be skipped."""
        found = {f"grad_norm/{role}": torch.stack(norms).mean() for role, norms in self.norms.items()}
        if self.scaler is not None or self.guard.settings.policy == "skip":
            found["skipped_steps"] = torch.tensor(float(self.skipped))
        return found

    def _clip(self, role: str) -> Tensor:
        """Clip the role's gradient; its norm before."""
        return clip_grad_norm_(self.roles.parameters_of(role), self.roles.optimization_of(role).gradient_clip)

    def _apply(self, optimizer: torch.optim.Optimizer) -> None:
        if self.scaler is not None:
            # Not the strategy's step, which would unscale again.
            self.scaler.step(optimizer)
        else:
            self.module.trainer.strategy.optimizer_step(optimizer, lambda: None, self.module)

    def _only_scaled_too_high(self, attempt: Attempt) -> bool:
        """Whether only the scaled gradient is not finite: the scaler is about to halve its scale.

        At a scale of 1 or less, the gradient itself is not finite.
        """
        if self.scaler is None or self.scaler.get_scale() <= 1 or bool(torch.isfinite(attempt.norm)):
            return False
        return self.guard.agree(bool(torch.isfinite(attempt.loss)))
