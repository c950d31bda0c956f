"""Distribution matching: the gradient that moves student samples toward the teacher's distribution.

Source: DMD (2311.18828), Eqs. 7 and 8; DMD2 (2405.14867), section 3.
"""

from __future__ import annotations

from torch import Tensor


def normalizer(x: Tensor, real: Tensor, floor: float = 1e-3) -> Tensor:
    """``n = mean_{C,H,W} |x - real|``, one per sample, at least ``floor``; no gradient. ``[B, ...]`` to ``[B]``."""
    return (x - real).detach().abs().flatten(1).mean(1).clamp(min=floor)


def dm_direction(real: Tensor, fake: Tensor) -> Tensor:
    """``fake - real``: where the student's distribution exceeds the teacher's; ``x - direction`` is the target."""
    return (fake - real).detach()


def dm_reward(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """``R_dm = mean |x - fake|^2 - mean |x - real|^2``: high where the teacher explains a sample better. ``[B]``.

    Source: the idea is that of R_dm (2603.28460); this form is ours.
    """
    toward_fake, toward_real = ((x - end).detach().square().flatten(1).mean(1) for end in (fake, real))
    return toward_fake - toward_real


def dm_loss(x: Tensor, target: Tensor, n: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """``mean_B w 0.5 mean_{C,H,W} (x - sg(y))^2 / n``, the distillation loss toward implicit targets.

    With ``y = x - (fake - real)`` its gradient in ``x`` is ``w g / numel`` where ``g = (fake - real) / n``.

    Args:
        x: Student output with gradient, ``[B, C, H, W]``.
        target: Implicit target ``y``, ``[B, C, H, W]``; detached here.
        n: Normalizer, ``[B]``.
        weight: Signed weight of each sample, ``[B]``.

    Source: DMD2 (2405.14867), Eq. 4; the weight is GDMD's (2604.19009) to first order.
    """
    squared = (x - target.detach()).square().flatten(1).mean(1)
    return (weight * 0.5 * squared / n).mean()
