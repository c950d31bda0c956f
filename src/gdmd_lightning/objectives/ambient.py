"""Ambient matching: a network learns the velocity of clean data from samples ``x_s`` that are still at level ``s``.

Source: AC-DMD in RTDMD (2605.26108).
"""

from __future__ import annotations

from torch import Tensor

from gdmd_lightning.schedules import per_sample


def ambient_coefficients(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``a = (1 - t) / (1 - s)`` and ``q`` with ``q^2 = t^2 - a^2 s^2``: from level ``s`` to ``t >= s``; all ``[B]``."""
    a = (1 - t) / (1 - s)
    return a, (t**2 - a**2 * s**2).clamp(min=0).sqrt()


def ambient_renoise(x_s: Tensor, s: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """``x_t = a x_s + q eps``: samples at level ``s`` noised further, to ``t``.

    Args:
        x_s: ``[B, ...]`` at levels ``s``.
        s: ``[B]``, below 1.
        t: ``[B]``, at least ``s``.
        eps: Standard normal, ``[B, ...]``.
    """
    a, q = ambient_coefficients(s, t)
    return per_sample(a, x_s) * x_s + per_sample(q, x_s) * eps


def ambient_loss(
    velocity: Tensor,
    x_s: Tensor,
    s: Tensor,
    t: Tensor,
    eps: Tensor,
    largest_weight: float,
    weight: Tensor | None = None,
) -> Tensor:
    """``mean w |q v - q u|^2`` with ``u = -x_s / (1 - s) + eps (t + (1 - t) s^2 / (1 - s)^2) / q``.

    ``u`` is unbiased for ``E[v | x_t]``, so the minimizer is that of flow matching on clean data. It diverges as ``t``
    approaches ``s``, so both sides are multiplied by ``q`` and weighted by ``w = min(1 / q^2, largest_weight)``.

    Args:
        velocity: The network's velocity at ``x_t = a x_s + q eps``, ``[B, ...]``.
        x_s, s, t, eps: As in :func:`ambient_renoise`.
        largest_weight: Upper limit of ``w``. Source: RTDMD's 10.
        weight: A further factor of ``w``, ``[B]``, as of :func:`velocity_loss`; ``None`` for 1.
    """
    _, q = ambient_coefficients(s, t)
    noise_factor = t + (1 - t) * s**2 / (1 - s) ** 2
    scaled = per_sample(noise_factor, x_s) * eps - per_sample(q / (1 - s), x_s) * x_s
    error = (per_sample(q, x_s) * velocity - scaled).square().flatten(1).mean(1)
    error = error / (q**2).clamp(min=1 / largest_weight)
    return (error if weight is None else weight * error).mean()


def consistency_loss(h: Tensor, h_1: Tensor, h_2: Tensor) -> Tensor:
    """``mean (h_1 - h)(h_2 - h)``, unbiased for ``|E[h'] - h|^2`` if ``h_1``, ``h_2`` are independent draws of ``h'``.

    A single draw would also be charged for its variance. All arguments are clean latents ``[B, ...]``.
    """
    return ((h_1 - h) * (h_2 - h)).mean()
