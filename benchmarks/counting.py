"""Counters of what an update asks its networks, its decoder and its reward: what the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from gdmd_lightning.methods.base import DistillationModule


class Counted:
    """Evaluations of networks, in latents.

    Attributes:
        all: All of them.
        trained: Those with a backward pass.
        calls: Forward passes of a whole batch.
        learning: Those with a backward pass.
    """

    def __init__(self) -> None:
        self.all = self.trained = self.calls = self.learning = 0

    def watch(self, network: nn.Module) -> nn.Module:
        network.register_forward_pre_hook(self._count, with_kwargs=True)
        return network

    def _count(self, network: nn.Module, args: Any, kwargs: Any) -> None:
        rows = len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
        learning = torch.is_grad_enabled() and any(p.requires_grad for p in network.parameters())
        self.all += rows
        self.trained += rows * learning
        self.calls += 1
        self.learning += learning


PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "attention", "convolution")
"""Operators that are products of matrices, by parts of their names."""


@dataclass(frozen=True)
class Time:
    """Seconds in torch's operators on the CPU.

    Args:
        products: In products of matrices, attention, and convolutions.
        all: In all of them.
    """

    products: float
    all: float

    def __str__(self) -> str:
        share = f"{self.products:.2f} s of them ({self.products / self.all:.0%})"
        return f"{self.all:.2f} s in operators, {share} in products of matrices, attention and convolutions"


def time_in_products(work: Callable[[], object]) -> Time:
    """Do something once under torch's profiler, which takes a little longer than without."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    return time_of(recorded)


def time_of(recorded: profile) -> Time:
    """What a profile that has ended says."""
    seconds = {event.key: event.self_cpu_time_total / 1e6 for event in recorded.key_averages()}
    products = (s for name, s in seconds.items() if any(part in name for part in PRODUCTS))
    return Time(sum(products), sum(seconds.values()))


class Asked:
    """What a module with full weights is asked from now on, by role, and how many pictures are decoded and judged.

    Args:
        module: After ``configure_model``; its networks, family and reward are watched.
    """

    def __init__(self, module: DistillationModule) -> None:
        names = ("teacher", *(spec.name for spec in module.roles.specs if spec.head is None))
        self.networks = {name: Counted() for name in names}
        for name, counted in self.networks.items():
            counted.watch(module.roles.standalone(name))
        self.decoded = self.judged = 0
        decode, family = module.family.decode, module.family

        def decoding(latents: Tensor) -> Tensor:
            self.decoded += len(latents)
            return decode(latents)

        family.decode = decoding  # type: ignore[method-assign]
        if module.judge is not None:
            self._watch_reward(module.judge.reward)

    def _watch_reward(self, reward: Any) -> None:
        score = reward.score

        def scoring(images: Tensor, prompts: Sequence[Any]) -> Tensor:
            self.judged += len(images)
            return score(images, prompts)

        reward.score = scoring

    def per_sample(self, samples: int) -> dict[str, float]:
        """Counts divided by a number of samples: roles that were asked, ``decodings`` and ``rewards``."""
        found = {name: counted.all / samples for name, counted in self.networks.items() if counted.all}
        return {**found, "decodings": self.decoded / samples, "rewards": self.judged / samples}
