"""Noise levels: one ``sigma`` in [0, 1] for every family, its grids and shifts, and distributions to draw it from.

Everything above a network works with ``x_sigma = (1 - sigma) x0 + sigma eps`` (rectified flow). A variance-preserving
network (``x_t = a_t x0 + s_t eps``, ``a_t^2 + s_t^2 = 1``) is mapped there exactly by
``sigma = s_t / (a_t + s_t)`` and ``x_sigma = x_t / (a_t + s_t)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.ranges import Count, Finite, Fraction, OpenFraction, Positive, ranged
from gdmd_lightning.streams import BatchStream, draw_uniform


def per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """Reshape ``sigma`` ``[B]`` so that it broadcasts against ``like`` ``[B, ...]``, in its dtype."""
    return sigma.to(like.dtype).view(-1, *[1] * (like.dim() - 1))


def renoise(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """``x_sigma = (1 - sigma) x0 + sigma eps`` for ``x0`` ``[B, ...]`` and ``sigma`` ``[B]``."""
    sigma = per_sample(sigma, x0)
    return (1 - sigma) * x0 + sigma * eps


def x0_from_velocity(x_sigma: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """``x0 = x_sigma - sigma * velocity``, with ``velocity = eps - x0``."""
    return x_sigma - per_sample(sigma, x_sigma) * velocity


def velocity_from_x0(x_sigma: Tensor, x0: Tensor, sigma: Tensor) -> Tensor:
    """``velocity = (x_sigma - x0) / sigma``; ``sigma`` in (0, 1]."""
    return (x_sigma - x0) / per_sample(sigma, x_sigma)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """``s sigma / (1 + (s - 1) sigma)``: moves levels toward noise for ``s > 1``.

    Source: Stable Diffusion 3 (2403.03206), Eq. 23.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def sigma_from_vp(alpha: Tensor, noise: Tensor) -> Tensor:
    """Flow level of a variance-preserving state ``alpha x0 + noise eps``: ``noise / (alpha + noise)``."""
    return noise / (alpha + noise)


def vp_from_sigma(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """``(a, s)`` with ``a^2 + s^2 = 1`` for a flow level: the inverse of :func:`sigma_from_vp`."""
    scale = torch.sqrt((1 - sigma) ** 2 + sigma**2)
    return (1 - sigma) / scale, sigma / scale


def few_step_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """Levels of a generator with ``steps`` steps, ``[steps + 1]``: 1, ..., 1/steps (shifted), then 0.

    Source: DMD2 (2405.14867), section 4.4: timesteps 1000, 750, 500, 250 for four steps.
    """
    return torch.cat([shift_sigma(torch.arange(steps, 0, -1) / steps, shift), torch.zeros(1)])


class RenoiseDistribution(ABC):
    """Distribution of renoise levels, sampled through its quantile function so that a group can be stratified."""

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """Levels ``sigma`` at the quantiles ``u`` in [0, 1]."""

    def quantile_above(self, u: Tensor, sigma_min: Tensor) -> Tensor:
        """Levels at the quantiles ``u`` of the same distribution restricted to levels above ``sigma_min``.

        Where no level is above ``sigma_min`` the highest level is returned.
        """
        low, high = torch.zeros_like(sigma_min), torch.ones_like(sigma_min)
        for _ in range(30):  # bisection for the probability of levels below sigma_min, to float32's precision
            middle = (low + high) / 2
            below = self.quantile(middle) < sigma_min
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        start = torch.where(sigma_min <= self.quantile(torch.zeros_like(sigma_min)), torch.zeros_like(high), high)
        return self.quantile(start + (1 - start) * u)


@ranged
@dataclass(frozen=True)
class Uniform(RenoiseDistribution):
    """Uniform in ``[low, high]``, then shifted. Source: DMD2's ``[0.02, 0.98]``."""

    low: Fraction = 0.02
    high: Fraction = 0.98
    shift: Positive = 1.0

    def __post_init__(self) -> None:
        _check_order(self, "low", "high")

    def quantile(self, u: Tensor) -> Tensor:
        return shift_sigma(self.low + (self.high - self.low) * u, self.shift)


@ranged
@dataclass(frozen=True)
class UniformTimestep(RenoiseDistribution):
    """Uniform over timesteps of a variance-preserving network, converted to flow levels.

    Args:
        low, high: Range, as fractions of ``timesteps``. Source: DMD2's ``[0.02, 0.98]`` on SDXL.
        timesteps: Number of timesteps of the network's schedule.
        beta_start, beta_end: Its first and last beta; their square roots are evenly spaced (``scaled_linear``).
    """

    low: Fraction = 0.02
    high: Fraction = 0.98
    timesteps: Count = 1000
    beta_start: OpenFraction = 0.00085
    beta_end: OpenFraction = 0.012

    def __post_init__(self) -> None:
        _check_order(self, "low", "high")
        _check_order(self, "beta_start", "beta_end")

    def quantile(self, u: Tensor) -> Tensor:
        roots = torch.linspace(self.beta_start**0.5, self.beta_end**0.5, self.timesteps, dtype=torch.float64)
        alphas = torch.cumprod(1 - roots**2, 0)
        sigmas = sigma_from_vp(alphas.sqrt(), (1 - alphas).sqrt())
        t = (self.low + (self.high - self.low) * u.double()) * self.timesteps
        return sigmas[t.long().clamp(0, self.timesteps - 1)].to(u.dtype)


@ranged
@dataclass(frozen=True)
class LogitNormal(RenoiseDistribution):
    """``sigmoid(mean + std z)``, then shifted and clamped to ``[low, high]``. Source: SD3 (2403.03206), 3.1."""

    mean: Finite = 0.0
    std: Positive = 1.0
    shift: Positive = 1.0
    low: Fraction = 0.02
    high: Fraction = 0.98

    def __post_init__(self) -> None:
        _check_order(self, "low", "high")

    def quantile(self, u: Tensor) -> Tensor:
        z = math.sqrt(2) * torch.erfinv((2 * u - 1).clamp(-1 + 1e-6, 1 - 1e-6))
        return shift_sigma(torch.sigmoid(self.mean + self.std * z), self.shift).clamp(self.low, self.high)


@ranged
@dataclass(frozen=True)
class Tilted(RenoiseDistribution):
    """Another distribution with its quantiles drawn from ``Beta(alpha, beta)`` instead of evenly.

    ``Beta(1, 1)`` changes nothing; more weight falls on high levels where ``alpha > beta``. Of a uniform distribution
    on [0, 1] this is ``Beta(alpha, beta)`` itself.
    """

    base: RenoiseDistribution
    alpha: Positive
    beta: Positive

    def quantile(self, u: Tensor) -> Tensor:
        from scipy.special import betaincinv

        return self.base.quantile(torch.from_numpy(betaincinv(self.alpha, self.beta, u.double().numpy())).to(u.dtype))


def _check_order(settings: RenoiseDistribution, low: str, high: str) -> None:
    if getattr(settings, low) > getattr(settings, high):
        raise UserError(
            f"{low} {getattr(settings, low)} is above {high} {getattr(settings, high)}",
            where=type(settings).__name__,
            remedy="exchange them",
        )


def draw_spread_sigmas(distribution: RenoiseDistribution, rows: int, rng: torch.Generator | BatchStream) -> Tensor:
    """Draw one renoise level for each row of a batch, ``[rows]`` on the CPU.

    The ``i``-th falls into the ``i``-th of equally likely intervals, as many as the batch of all ranks has rows.
    """
    numbers, total = range(rows), rows
    if isinstance(rng, BatchStream):
        numbers, total = rng.numbers(rows), rows * rng.world_size
    return distribution.quantile((torch.tensor(numbers) + draw_uniform((rows,), rng)) / total)


def draw_renoise_sigmas(
    distribution: RenoiseDistribution,
    batch: int,
    group: int,
    rng: torch.Generator | BatchStream,
    *,
    stratify: bool = True,
    sigma_min: Tensor | None = None,
) -> Tensor:
    """Draw renoise levels ``[batch, group]``, on the CPU.

    With ``stratify`` the ``j``-th level of a group falls into the ``j``-th of ``group`` equally likely intervals,
    so that each group spans the distribution; averaged over ``j`` the distribution is unchanged.

    Args:
        distribution: Of the levels.
        batch, group: Shape of the draw.
        rng: Random stream.
        stratify: Spread the levels of a group.
        sigma_min: Draw each row's levels only above this one, ``[batch]`` on the CPU; ``None`` for all levels.
    """
    u = draw_uniform((batch, group), rng)
    if stratify:
        u = (torch.arange(group) + u) / group
    if sigma_min is None:
        return distribution.quantile(u)
    return distribution.quantile_above(u, sigma_min[:, None].expand(batch, group))
