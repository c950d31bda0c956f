"""Flow matching: how a network learns the velocity of a distribution from its samples."""

from __future__ import annotations

from torch import Tensor

from gdmd_lightning.schedules import per_sample


def velocity_loss(velocity: Tensor, x0: Tensor, eps: Tensor, weight: Tensor | None = None) -> Tensor:
    """``mean w (v - (eps - x0))^2`` over everything.

    Args:
        velocity, x0, eps: ``[B, C, H, W]``.
        weight: ``w``, ``[B]``; ``None`` for 1.

    Source: Flow Matching (2210.02747), Eq. 14; for the fake score DMD2 (2405.14867), Eq. 3.
    """
    error = (velocity - (eps - x0)).square()
    return (error if weight is None else per_sample(weight, error) * error).mean()
