"""One process with the batch of all ranks: what several processes must reproduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.engines.base import Engine
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import DistillationModule


class Alone(Engine):
    """The steps of a process without a trainer."""

    def __init__(self, module: DistillationModule, made: dict[str, Any]) -> None:
        super().__init__(module.roles)
        self.made = made
        self.norms: dict[str, list[Tensor]] = {}

    def zero_grad(self, role: str) -> None:
        for parameter in self.roles.parameters_of(role):
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, role: str) -> bool:
        clip = self.roles.optimization_of(role).gradient_clip
        self.norms.setdefault(role, []).append(clip_grad_norm_(self.roles.parameters_of(role), clip))
        self.made[role]["optimizer"].step()
        return True


def train_together(
    build: Callable[[], DistillationModule], updates: int, ranks: int = 2, **data: Any
) -> tuple[list[dict[str, float]], DistillationModule]:
    """Train on the samples that so many ranks have together.

    Args:
        build: Makes the module.
        updates: Their number.
        ranks: Their number.
        data: Arguments of :class:`PromptDataModule` on each rank.

    Returns:
        The logs of each update, and the module after training.
    """
    module = build()
    module.configure_model()
    batches = iter(PromptDataModule("shapes", **{**data, "batch_size": ranks * data["batch_size"]}).train_dataloader())
    made = dict(zip(module.roles.trained, module.configure_optimizers(), strict=True))
    logs: list[dict[str, float]] = []
    for _ in range(updates):
        batch = next(batches)
        conditioning = module.embeddings([prompt.text for prompt in batch.prompts])
        engine = Alone(module, made)
        done = module.update(Batch(batch.prompts, batch.groups, conditioning, module.real_x0(batch.prompts)), engine)
        module.updates += 1
        for each in made.values():
            each["lr_scheduler"]["scheduler"].step()
        norms = {f"grad_norm/{role}": torch.stack(found).mean() for role, found in engine.norms.items()}
        logs.append({name: float(value) for name, value in (done.logs | norms).items()})
    return logs, module
