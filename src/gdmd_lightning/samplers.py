"""Few-step samplers: one function per step, one class per sampler, and the rollout that applies them.

Every step takes its noise as an argument; nothing here draws from a hidden random stream.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gdmd_lightning.ranges import Fraction, Positive, ranged
from gdmd_lightning.schedules import per_sample
from gdmd_lightning.streams import Streams, draw_noise

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``predict(x_sigma [B, ...], sigma [B], rows [B]) -> velocity [B, ...]``; ``rows`` are the indices of the
samples in the batch, on the CPU."""

LogProb = Literal["gaussian", "squared_error"]
"""How the log-probability of a step is counted, see :meth:`Transition.log_prob`."""


@dataclass(frozen=True)
class Transition:
    """One step from ``sigma`` to ``sigma_next``: ``sample = mean + std * noise``.

    Args:
        mean: ``[B, ...]``.
        std: ``[B]``, 0 where the step is deterministic.
        sample: ``[B, ...]``.
    """

    mean: Tensor
    std: Tensor
    sample: Tensor

    def log_prob(self, sample: Tensor, form: LogProb = "gaussian") -> Tensor:
        """Log-probability of ``sample`` ``[B, ...]`` under this step, averaged over elements, ``[B]``.

        A deterministic step has none: the Gaussian one is infinite or NaN where ``std`` is 0.

        Args:
            sample: Where the step led.
            form: ``gaussian``; or ``squared_error``, ``-(sample - mean)^2`` without ``1 / (2 std^2)`` and constants,
                whose ratios, and so clip ranges, are on another scale.

        Source: Flow-GRPO (2505.05470), which averages over elements instead of summing; RTDMD's code
        (2605.26108) for ``squared_error``.
        """
        if form == "squared_error":
            return -((sample - self.mean) ** 2).flatten(1).mean(1)
        std = per_sample(self.std, sample)
        log_prob = -((sample - self.mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
        return log_prob.flatten(1).mean(1)


def step_ode(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
    """Euler step of the probability flow, ``x + (sigma_next - sigma) v``; deterministic."""
    mean = x + per_sample(sigma_next - sigma, x) * v
    return Transition(mean, torch.zeros_like(sigma), mean)


def step_renoise(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Transition:
    """Go to ``x0`` and back to ``sigma_next`` with fresh noise. Source: DMD2 (2405.14867), section 4.4."""
    x0 = x - per_sample(sigma, x) * v
    mean = (1 - per_sample(sigma_next, x)) * x0
    return Transition(mean, sigma_next, mean + per_sample(sigma_next, x) * noise)


def step_cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, noise: Tensor) -> Transition:
    """Coefficient-preserving step: keep ``cos(eta pi/2)`` of the predicted noise and add fresh noise for the rest.

    ``eta = 0`` is :func:`step_ode`, ``eta = 1`` is :func:`step_renoise`. Source: RTDMD (2605.26108).
    """
    x0 = x - per_sample(sigma, x) * v
    eps = x + (1 - per_sample(sigma, x)) * v
    kept, fresh = math.cos(eta * math.pi / 2), math.sin(eta * math.pi / 2)
    mean = (1 - per_sample(sigma_next, x)) * x0 + per_sample(sigma_next, x) * kept * eps
    std = sigma_next * fresh
    return Transition(mean, std, mean + per_sample(std, x) * noise)


def step_sde(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float, noise: Tensor
) -> Transition:
    """Euler-Maruyama step of the reverse SDE with the flow's marginals.

    ``std = noise_level sqrt(sigma / (1 - sigma))``; at ``sigma = 1`` the denominator uses ``sigma_max`` instead.
    Source: Flow-GRPO (2505.05470), Eq. 9.
    """
    dt = per_sample(sigma_next - sigma, x)
    below = torch.where(sigma >= 1, torch.full_like(sigma, sigma_max), sigma)
    std = noise_level * torch.sqrt(sigma / (1 - below))
    std = torch.where(sigma_next > 0, std, torch.zeros_like(std))  # the last step is an Euler step
    g, s = per_sample(std, x), per_sample(sigma, x)
    mean = x * (1 + g**2 * dt / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    total = std * torch.sqrt((sigma - sigma_next).to(std.dtype))
    return Transition(mean, total, mean + per_sample(total, x) * noise)


class Sampler(ABC):
    """How a few-step generator goes from one noise level to the next.

    A step to ``sigma_next = 0`` is deterministic for all samplers.

    Attributes:
        stochastic: Whether steps draw fresh noise.
        scheduler: Kind of the diffusers scheduler that takes the same steps; ``None`` if there is none.
    """

    stochastic: ClassVar[bool]
    scheduler: ClassVar[Literal["euler", "renoise"] | None] = None

    @abstractmethod
    def step(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, sigma_max: float
    ) -> Transition:
        """Take one step.

        Args:
            x: ``[B, ...]`` at levels ``sigma`` ``[B]``.
            v: Velocity, ``[B, ...]``.
            sigma, sigma_next: ``[B]``, ``sigma_next < sigma``.
            noise: Standard normal, ``[B, ...]``; ignored where the step is deterministic.
            sigma_max: The first level below 1 of the sampler's grid, or 0 if there is none.
        """


@dataclass(frozen=True)
class ODE(Sampler):
    """Euler steps of the probability flow."""

    stochastic = False
    scheduler = "euler"

    def step(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, sigma_max: float
    ) -> Transition:
        return step_ode(x, v, sigma, sigma_next)


@dataclass(frozen=True)
class Renoise(Sampler):
    """Fresh noise between the steps. Source: DMD2 (2405.14867), section 4.4."""

    stochastic = True
    scheduler = "renoise"

    def step(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, sigma_max: float
    ) -> Transition:
        return step_renoise(x, v, sigma, sigma_next, noise)


@ranged
@dataclass(frozen=True)
class CPS(Sampler):
    """Coefficient-preserving steps.

    Args:
        eta: Share of fresh noise.

    Source: RTDMD (2605.26108), which uses 0.9.
    """

    eta: Fraction = 0.9

    stochastic = True

    def step(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, sigma_max: float
    ) -> Transition:
        return step_cps(x, v, sigma, sigma_next, self.eta, noise)


@ranged
@dataclass(frozen=True)
class SDE(Sampler):
    """Euler-Maruyama steps of the reverse SDE; the step to 0 is an Euler step.

    Args:
        noise_level: Factor on the noise.

    Source: Flow-GRPO (2505.05470), which uses 0.7.
    """

    noise_level: Positive = 0.7

    stochastic = True

    def step(
        self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor, sigma_max: float
    ) -> Transition:
        return step_sde(x, v, sigma, sigma_next, self.noise_level, sigma_max, noise)


@dataclass(frozen=True)
class Trajectory:
    """A rollout from pure noise.

    Args:
        sampler: How the steps were taken.
        sigmas: The sampler's levels and a final 0, ``[K + 1]``.
        states: ``x`` before and after each step taken, ``[B, C, H, W]`` each; ``states[k]`` is at ``sigmas[k]``,
            except for samples that stopped before.
        transitions: The steps; ``transitions[k]`` led from ``states[k]`` to ``states[k + 1]``. Empty where samples
            stopped at different steps, since no step then covers the batch.
    """

    sampler: Sampler
    sigmas: Tensor
    states: tuple[Tensor, ...]
    transitions: tuple[Transition, ...]

    @property
    def x0(self) -> Tensor:
        """The last state: the samples of a full rollout."""
        return self.states[-1]

    def select(self, rows: slice) -> Trajectory:
        """The paths of the given samples."""
        steps = (Transition(step.mean[rows], step.std[rows], step.sample[rows]) for step in self.transitions)
        return Trajectory(self.sampler, self.sigmas, tuple(x[rows] for x in self.states), tuple(steps))

    def log_prob(self, k: int, form: LogProb = "gaussian") -> Tensor:
        """Log-probability of the ``k``-th step as it was taken, ``[B]``, see :meth:`Transition.log_prob`."""
        return self.transitions[k].log_prob(self.states[k + 1], form)

    def redo(self, predict: Predict, k: int) -> Transition:
        """Repeat the ``k``-th step with gradient of ``predict``; only its ``mean`` and ``std`` are useful."""
        x = self.states[k]
        sigma, sigma_next = (self.sigmas[i].to(x).expand(len(x)) for i in (k, k + 1))
        v = predict(x, sigma, torch.arange(len(x)))
        return self.sampler.step(x, v, sigma, sigma_next, torch.zeros_like(x), _sigma_max(self.sigmas))


@torch.no_grad()
def rollout(
    predict: Predict,
    noise: Tensor,
    sigmas: Tensor,
    sampler: Sampler,
    rng: Streams | None = None,
    stop: Tensor | None = None,
    shared: Mapping[int, Tensor] | None = None,
) -> Trajectory:
    """Sample from pure noise, without gradient.

    With ``stop`` this is backward simulation: each sample stops at its own level, and each step evaluates
    only the samples that take it.

    Args:
        predict: The generator's velocity.
        noise: Standard normal, ``[B, C, H, W]``.
        sigmas: The sampler's levels and a final 0, ``[K + 1]``, on the CPU.
        sampler: How steps are taken.
        rng: Random stream of the steps' noise; required for stochastic samplers.
        stop: Step index at which each sample stops, ``[B]`` in ``0..K``, on the CPU, to avoid waiting for the
            device; ``None`` takes all steps.
        shared: By step, the row whose noise each sample takes, ``[B]``; in other steps each has its own.

    Raises:
        ValueError: If a stochastic sampler has no ``rng``.

    Source: DMD2 (2405.14867), section 4.5.
    """
    if rng is None and sampler.stochastic:
        raise ValueError(f"{type(sampler).__name__} needs an rng for its fresh noise")
    x = sigmas[0].to(noise.dtype) * noise
    states, transitions = [x], []
    for k in range(len(sigmas) - 1 if stop is None else int(stop.max())):
        fresh = draw_noise(tuple(noise.shape), rng, noise.device) if rng is not None and sampler.stochastic else x
        if shared is not None and k in shared:
            fresh = fresh[shared[k].to(fresh.device)]
        rows = torch.arange(len(x)) if stop is None else torch.nonzero(stop > k)[:, 0]
        everyone, index = len(rows) == len(x), rows.to(x.device)
        here, noise_here = (x, fresh) if everyone else (x[index], fresh[index])
        sigma, sigma_next = (sigmas[i].to(x).expand(len(rows)) for i in (k, k + 1))
        step = sampler.step(here, predict(here, sigma, rows), sigma, sigma_next, noise_here, _sigma_max(sigmas))
        x = step.sample.to(x.dtype) if everyone else x.index_copy(0, index, step.sample.to(x.dtype))
        states.append(x)
        transitions.append(step)
    return Trajectory(sampler, sigmas, tuple(states), () if stop is not None else tuple(transitions))


def draws_noise(sampler: Sampler) -> bool:
    """Whether steps above level 0 have a density: not for ODE steps, nor for CPS with ``eta`` 0."""
    x, sigma = torch.ones(1, 1), torch.ones(1)
    return bool(sampler.step(x, x, sigma, sigma / 2, x, 0.5).std > 0)


def _sigma_max(sigmas: Tensor) -> float:
    below = sigmas[sigmas < 1]
    return float(below.max()) if len(below) else 0.0
