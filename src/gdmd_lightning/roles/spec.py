"""Declarations of a method's roles, and the optimizer settings of trained ones."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.ranges import Decay, Fraction, NonNegative, Positive, Whole, ranged

TEACHER = "teacher"
"""The frozen network of the pipeline; every method has this role, and no spec declares it."""
REFERENCE = "reference"
"""The role that keeps the generator with which a run started; ``start_from`` gives no other."""


@ranged
@dataclass(frozen=True)
class Optimization:
    """AdamW for one role.

    Args:
        learning_rate: Learning rate after the warm-up.
        betas: Decay rates of AdamW's moments.
        weight_decay: Decoupled weight decay.
        gradient_clip: Largest gradient norm.
        warmup: Updates during which the learning rate rises linearly.
        schedule: The learning rate after the warm-up: ``constant``, or falling on a line (``linear``) or half a cosine
            (``cosine``) to ``final_learning_rate_factor`` at ``trainer.max_steps``. It depends only on the number of
            the update and on ``max_steps``: a run resumed with a larger ``max_steps`` goes on with the rate that a run
            of that length has there, which is higher than the one it stopped with.
        final_learning_rate_factor: Fraction of ``learning_rate`` at the end of a falling schedule.
        algorithm: ``adamw``, or ``adamw_8bit`` of bitsandbytes, which stores each moment in one byte.
    """

    learning_rate: NonNegative = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.99)
    weight_decay: NonNegative = 0.01
    gradient_clip: Positive = 1.0
    warmup: Whole = 10
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    final_learning_rate_factor: Fraction = 0.0
    algorithm: Literal["adamw", "adamw_8bit"] = "adamw"

    def check(self, role: str, max_steps: int) -> None:
        """Fail early if the optimizer is not installed, or the schedule has no end.

        Args:
            role: Whose settings these are, for the message.
            max_steps: The trainer's; -1 for no end.

        Raises:
            UserError: If bitsandbytes is needed and missing, or ``max_steps`` is needed and not set.
        """
        if self.schedule != "constant" and max_steps < 1:
            raise UserError(
                f"a {self.schedule} schedule ends at trainer.max_steps, which is {max_steps}",
                where=f"model.{role}.schedule",
                remedy="set trainer.max_steps, or use constant",
            )
        if self.algorithm == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "adamw_8bit requires bitsandbytes, which is not installed",
                where="optimizer algorithm",
                remedy="pip install bitsandbytes, or use adamw",
            )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """Build the optimizer of these parameters.

        AdamW is torch's fused one, which passes over the numbers once; by default torch loops over operations.
        """
        algorithm: Any = partial(torch.optim.AdamW, fused=True)
        if self.algorithm == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit as algorithm  # type: ignore[import-not-found, no-redef]
        optimizer: torch.optim.Optimizer = algorithm(
            parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        return optimizer

    def scheduler(self, optimizer: torch.optim.Optimizer, updates: int) -> torch.optim.lr_scheduler.LRScheduler:
        """Build the learning-rate schedule of ``updates`` updates (unused if constant), stepped once per update."""
        if self.schedule != "constant":
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: self.factor(update, updates))
        warmup = max(self.warmup, 1)
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup - 1)

    def factor(self, update: int, updates: int) -> float:
        """Factor on the learning rate in update number ``update``, from 0, of ``updates``."""
        start = max(self.warmup, 1) - 1  # the first update with the full rate
        if update < start:
            return (update + 1) / (start + 1)
        if self.schedule == "constant":
            return 1.0
        done = min((update - start) / max(updates - start, 1), 1.0)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.final_learning_rate_factor + (1 - self.final_learning_rate_factor) * left


@dataclass(frozen=True)
class Head:
    """A small network on features of a role, instead of a copy of the teacher's network.

    Args:
        hidden: Width of its layer, at least 1.
        seed: Seed of its initial weights.
    """

    hidden: int = 256
    seed: int = 0


@dataclass(frozen=True)
class RoleSpec:
    """One role of a method: trained, an average of a trained role, or a past state of one.

    Args:
        name: Unique in the method, without a dot; not ``teacher``.
        optimizer: Settings of a trained role.
        average_of: Name of the trained role that this is the exponential moving average of.
        decay: Decay of the average per step of that role, in [0, 1).
        snapshot_of: Name of the trained role that this is a past state of, or an average of past states; the method
            decides when it is taken or moved.
        head: A trained role that is a head on features; ``None`` for a network like the teacher's.
        followed: For a role that is built alone: the role that it follows in its method.

    Raises:
        ValueError: If the spec contradicts itself.
    """

    name: str
    optimizer: Optimization | None = None
    average_of: str | None = None
    decay: float = 0.0
    snapshot_of: str | None = None
    head: Head | None = None
    followed: str | None = None

    def __post_init__(self) -> None:
        if sum(kind is not None for kind in (self.optimizer, self.average_of, self.snapshot_of)) != 1:
            raise ValueError(f"role {self.name!r} must be trained, an average, or a snapshot")
        if self.head is not None and self.optimizer is None:
            raise ValueError(f"role {self.name!r} is a head, so it must be trained")
        if self.name == TEACHER or "." in self.name or not self.name:
            raise ValueError(f"{self.name!r} cannot be the name of a role")
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay of role {self.name!r} is {self.decay}, must be in [0, 1)")

    @property
    def source(self) -> str | None:
        """The role that this one follows, ``None`` for a trained one."""
        return self.average_of or self.snapshot_of

    @property
    def origin(self) -> str:
        """The trained role that this one is, follows, or followed."""
        return self.source or self.followed or self.name

    def alone(self, optimizer: Optimization) -> RoleSpec:
        """This role as the only one, for sampling and export."""
        return RoleSpec(self.name, optimizer=optimizer, followed=self.source)


def check_specs(specs: tuple[RoleSpec, ...]) -> None:
    """Fail if names repeat or a role follows one that is not trained.

    Raises:
        ValueError: If a spec is wrong; the message names its role.
    """
    trained = {spec.name for spec in specs if spec.optimizer is not None}
    names: set[str] = set()
    for spec in specs:
        if spec.name in names:
            raise ValueError(f"role {spec.name!r} is declared twice")
        names.add(spec.name)
        if spec.source is not None and spec.source not in trained:
            raise ValueError(f"role {spec.name!r} follows {spec.source!r}, which is not trained")
