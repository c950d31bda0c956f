"""Flow matching: how a network learns the velocity of a distribution from its samples."""

from __future__ import annotations

from torch import Tensor


def velocity_loss(velocity: Tensor, x0: Tensor, eps: Tensor) -> Tensor:
    """``mean (v - (eps - x0))^2`` over everything; all arguments ``[B, C, H, W]``.

    Source: Flow Matching (2210.02747), Eq. 14; for the fake score DMD2 (2405.14867), Eq. 3.
    """
    return (velocity - (eps - x0)).square().mean()
