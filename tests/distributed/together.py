"""Ranks played by threads of one process: what several processes must reproduce, computed without any of them.

Each thread has a module of its own. Where processes would exchange gradients, the threads meet, and both modules get
the mean: the gradient of the whole batch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.engines.base import Engine
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import DistillationModule


class Meeting(Engine):
    """The steps of one thread; the last thread to arrive averages everybody's gradient."""

    def __init__(self, module: DistillationModule, modules: list[DistillationModule], barrier: threading.Barrier, made):
        super().__init__(module.roles)
        self.module, self.modules, self.barrier, self.made = module, modules, barrier, made
        self.norms: dict[str, list[Tensor]] = {}

    def zero_grad(self, role: str) -> None:
        for parameter in self.roles.parameters_of(role):
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, role: str) -> bool:
        if self.barrier.wait() == 0:
            for own in zip(*(module.roles.parameters_of(role) for module in self.modules), strict=True):
                grads = [parameter.grad for parameter in own]
                if grads[0] is not None:
                    mean = torch.stack(grads).mean(0)
                    for parameter in own:
                        parameter.grad = mean.clone()
        self.barrier.wait()
        clip = self.roles.optimization_of(role).gradient_clip
        self.norms.setdefault(role, []).append(clip_grad_norm_(self.roles.parameters_of(role), clip))
        self.made[role]["optimizer"].step()
        return True


def train_together(
    build: Callable[[], DistillationModule], updates: int, ranks: int = 2, **data: Any
) -> tuple[list[list[dict[str, float]]], DistillationModule]:
    """Train on batches of the same prompts and noise as that number of ranks would see.

    Args:
        build: Makes the module.
        updates: Their number.
        ranks: Number of threads.
        data: Arguments of :class:`PromptDataModule`.

    Returns:
        The logs of each update on each rank, and the first module after training.
    """
    modules = []
    for rank in range(ranks):
        module = build()
        module.__class__ = type(f"Rank{rank}", (type(module),), {"global_rank": rank})
        module.configure_model()
        modules.append(module)
    barrier = threading.Barrier(ranks)
    logs: list[list[dict[str, float]]] = [[] for _ in modules]
    failures: list[BaseException] = []

    def work(rank: int) -> None:
        module = modules[rank]
        batches = iter(replace(PromptDataModule("shapes", **data)._stream(), rank=rank, world_size=ranks))
        made = dict(zip(module.roles.trained, module.configure_optimizers(), strict=True))
        try:
            for _ in range(updates):
                batch = next(batches)
                conditioning = module.embeddings([prompt.text for prompt in batch.prompts])
                real = module.real_x0(batch.prompts)
                engine = Meeting(module, modules, barrier, made)
                done = module.update(Batch(batch.prompts, batch.groups, conditioning, real), engine)
                module.updates += 1
                for each in made.values():
                    each["lr_scheduler"]["scheduler"].step()
                found = done.logs | {
                    f"grad_norm/{role}": torch.stack(norms).mean() for role, norms in engine.norms.items()
                }
                logs[rank].append({name: float(value) for name, value in found.items()})
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((error for error in failures if not isinstance(error, threading.BrokenBarrierError)), failures[0])
    return logs, modules[0]
