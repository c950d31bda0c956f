"""Settings that all distillation methods share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
    """

    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.01
    gradient_clip: float = 1.0
    warmup: int = 10


@dataclass(frozen=True)
class Matching:
    """How the teacher's and the fake score's opinions are asked.

    Args:
        guidance_scale: Of the teacher; the fake score and the student have none.
        law: Law of the renoise level.
        critic_updates: Critic updates a generator update.
        critic_samples: ``reused``: the critic learns from the samples that the generator's step has just made
            (no further evaluation of the generator); ``fresh``: it simulates its own for each of its updates, as
            DMD2's code does.
        floor: Lower clamp of the normaliser ``n``.
    """

    guidance_scale: float = 3.0
    law: RenoiseLaw = field(default_factory=UniformLaw)
    critic_updates: int = 5
    critic_samples: Literal["reused", "fresh"] = "reused"
    floor: float = 1e-3
