"""Settings that all distillation methods share."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.schedules import RenoiseLaw, UniformLaw


@dataclass(frozen=True)
class Optimization:
    """AdamW of one role.

    Args:
        learning_rate: Constant.
        betas: Of AdamW.
        weight_decay: Of AdamW.
        gradient_clip: Largest gradient norm.
        warmup: Updates over which the learning rate rises linearly.
        algorithm: ``adamw``, or bitsandbytes' ``adamw_8bit``, whose moments take a byte each.
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    warmup: int = 10
    algorithm: Literal["adamw", "adamw_8bit"] = "adamw"

    def check(self) -> None:
        """See that the algorithm is installed, before anything is loaded for it.

        Raises:
            UserError: If it is not.
        """
        if self.algorithm == "adamw_8bit" and importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                "adamw_8bit is bitsandbytes', which is not installed",
                where="optimizer algorithm",
                remedy="pip install bitsandbytes, or use adamw",
            )

    def over(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of these parameters."""
        algorithm: Any = torch.optim.AdamW
        if self.algorithm == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit as algorithm  # type: ignore[import-not-found, no-redef]
        optimizer: torch.optim.Optimizer = algorithm(
            parameters, lr=self.learning_rate, betas=self.betas, weight_decay=self.weight_decay
        )
        return optimizer


@dataclass(frozen=True)
class Matching:
    """How the teacher's and the fake score's opinions are asked.

    Args:
        guidance_scale: Of the teacher; the fake score and the student have none.
        law: Law of the renoise level at which they are asked.
        critic_law: Law of the level at which the fake score learns; ``law`` if null.
        critic_updates: Critic updates a generator update.
        critic_samples: ``reused``: the critic learns from the samples that the generator's step has just made
            (no further evaluation of the generator); ``fresh``: it simulates its own for each of its updates, as
            DMD2's code does.
        floor: Lower clamp of the normaliser ``n``.
    """

    guidance_scale: float = 3.0
    law: RenoiseLaw = field(default_factory=UniformLaw)
    critic_law: RenoiseLaw | None = None
    critic_updates: int = 5
    critic_samples: Literal["reused", "fresh"] = "reused"
    floor: float = 1e-3


@dataclass(frozen=True)
class Memory:
    """What is done to need less memory; none of it changes what is learned, but for rounding.

    Args:
        gradient_checkpointing: Compute activations anew in the backward pass: about a third more time.
        vae_slicing: Decode one picture after another.
        vae_tiling: Decode a picture in overlapping tiles, which changes their seams a little.
        reward: Where the reward is: on the ``accelerator`` beside the networks, ``offloaded`` to the CPU between its
            uses, or on the ``cpu`` for good.
    """

    gradient_checkpointing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    reward: Literal["accelerator", "offloaded", "cpu"] = "accelerator"
