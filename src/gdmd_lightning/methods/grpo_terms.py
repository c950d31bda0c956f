"""GRPO on the steps of a sampler, for use in any method: its settings, and the loss of one step.

Source: Flow-GRPO (2505.05470); RTDMD (2605.26108) for the subset of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.objectives.grpo import clipped_ratio_loss, policy_ratio
from gdmd_lightning.ranges import Count, Positive, ranged
from gdmd_lightning.samplers import SDE, LogProb, Predict, Sampler, Trajectory, Transition, draws_noise


@ranged
@dataclass(frozen=True)
class GRPO:
    """Policy gradient on the stochastic steps of full rollouts.

    Args:
        sampler: How the rollouts are taken; must draw noise. Generation uses ``model.sampler``.
        clip: Distance of a step's probability ratio from 1 beyond which it gives no gradient, above 0; depends on
            ``log_prob``.
        advantage_clip: Largest magnitude of an advantage, above 0.
        log_prob: ``gaussian``; or ``squared_error``, RTDMD's form without ``1 / (2 std^2)``.
        train_steps: Number of steps trained per update, drawn from the stochastic ones; null for all. The last step
            is deterministic. In steps that are not trained the samples of a prompt share their noise, so that their
            rewards differ less by what is not learned (SubGRPO, as in RTDMD's code).

    Raises:
        UserError: If a value is out of range, or the sampler draws no noise.

    Source: Flow-GRPO (2505.05470): noise level 0.7, advantages clipped at 5; clip of 1e-4 as in its code.
    """

    sampler: Sampler = field(default_factory=SDE)
    clip: Positive = 1e-4
    advantage_clip: Positive = 5.0
    log_prob: LogProb = "gaussian"
    train_steps: Count | None = None

    def __post_init__(self) -> None:
        if not draws_noise(self.sampler):
            raise UserError(
                f"{self.sampler} draws no noise, so its steps have no probabilities",
                where="model.grpo.sampler",
                remedy="use SDE, Renoise, or CPS with eta above 0",
            )

    def check_steps(self, steps: int) -> None:
        """Fail if a generator of this many steps has too few stochastic ones.

        Raises:
            UserError: If it has.
        """
        if steps < 2:
            raise UserError(
                f"it is {steps}, but the last step is deterministic and cannot be trained by GRPO",
                where="model.steps",
                remedy="use at least 2",
            )
        if self.train_steps is not None and self.train_steps > steps - 1:
            raise UserError(
                f"it is {self.train_steps}, but {steps - 1} of the generator's {steps} steps are stochastic",
                where="model.grpo.train_steps",
                remedy=f"use 1 to {steps - 1}, or null for all",
            )

    def draw_steps(self, steps: int, rng: torch.Generator) -> list[int]:
        """Indices of the steps to train in an update, in ``0..steps - 2``, in order."""
        return sorted(torch.randperm(steps - 1, generator=rng)[: self.train_steps].tolist())

    def shared_noise(self, steps: int, trained: Sequence[int], groups: Tensor) -> dict[int, Tensor]:
        """By stochastic step that is not trained, the row whose noise each sample takes: the first of its prompt.

        Args:
            steps: Steps of a rollout.
            trained: Indices of the trained ones.
            groups: Index of each sample's prompt, ``[B]``.
        """
        first = (groups[:, None] == groups).int().argmax(1)
        return {k: first for k in range(steps - 1) if k not in trained}


def grpo_term(
    predict: Predict, grpo: GRPO, path: Trajectory, k: int, advantages: Tensor
) -> tuple[Tensor, Transition, Tensor]:
    """Clipped-ratio loss of one step of rollouts.

    Args:
        predict: The generator's velocity, with gradient while it is learning.
        grpo: Settings.
        path: The rollouts, ``B`` rows, as they were taken.
        k: Index of the step.
        advantages: ``[B]``.

    Returns:
        The loss, the step as the generator takes it now, and the share of ratios beyond the clip.
    """
    now = path.redo(predict, k)
    ratio = policy_ratio(now.log_prob(path.states[k + 1], grpo.log_prob), path.log_prob(k, grpo.log_prob))
    clipped = ((ratio.detach() - 1).abs() > grpo.clip).float().mean()
    return clipped_ratio_loss(ratio, advantages, grpo.clip, grpo.advantage_clip), now, clipped
