"""Few-step samplers: one function a step, and the rollouts made of them.

Every step takes its noise as an argument; nothing here draws from a hidden random stream.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.schedules import per_sample

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``predict(x_sigma [B, ...], sigma [B], rows [B]) -> velocity [B, ...]``; ``rows`` number the samples asked for."""


@dataclass(frozen=True)
class Transition:
    """One step from ``sigma`` down to ``sigma_next``: ``sample = mean + std * noise``.

    Args:
        mean: ``[B, ...]``.
        std: ``[B]``, 0 where the step is deterministic.
        sample: ``[B, ...]``.
    """

    mean: Tensor
    std: Tensor
    sample: Tensor


def step_ode(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor) -> Transition:
    """Euler step of the probability flow, ``x + (sigma_next - sigma) v``; deterministic."""
    mean = x + per_sample(sigma_next - sigma, x) * v
    return Transition(mean, torch.zeros_like(sigma), mean)


def step_renoise(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Transition:
    """To ``x0`` and back to ``sigma_next`` with fresh noise. Source: DMD2 (2405.14867), section 4.4."""
    x0 = x - per_sample(sigma, x) * v
    mean = (1 - per_sample(sigma_next, x)) * x0
    return Transition(mean, sigma_next, mean + per_sample(sigma_next, x) * noise)


def step_cps(x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float, noise: Tensor) -> Transition:
    """Coefficient-preserving step: a part ``cos(eta pi/2)`` of the predicted noise is kept, the rest is fresh.

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

    ``std = noise_level sqrt(sigma / (1 - sigma))``; at ``sigma = 1`` the level ``sigma_max`` stands in for the
    denominator. Source: Flow-GRPO (2505.05470), Eq. 9.
    """
    dt = per_sample(sigma_next - sigma, x)
    below = torch.where(sigma >= 1, torch.full_like(sigma, sigma_max), sigma)
    std = noise_level * torch.sqrt(sigma / (1 - below))
    g, s = per_sample(std, x), per_sample(sigma, x)
    mean = x * (1 + g**2 * dt / (2 * s)) + v * (1 + g**2 * (1 - s) / (2 * s)) * dt
    total = std * torch.sqrt((sigma - sigma_next).to(std.dtype))
    return Transition(mean, total, mean + per_sample(total, x) * noise)


@dataclass(frozen=True)
class FewStepSampler:
    """How a few-step generator goes from noise to a picture.

    Args:
        steps: Number of network evaluations, at least 1.
        kind: ``ode`` (Euler), ``renoise`` (DMD2) or ``cps`` (RTDMD).
        eta: Share of fresh noise of ``cps``, in [0, 1].
    """

    steps: int = 4
    kind: Literal["ode", "renoise", "cps"] = "ode"
    eta: float = 0.9

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sampler.steps is {self.steps}, must be at least 1")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler.eta is {self.eta}, must be in [0, 1]")

    def step(self, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Transition:
        """One step of this sampler's kind; a step to ``sigma_next = 0`` is deterministic for all of them."""
        match self.kind:
            case "ode":
                return step_ode(x, v, sigma, sigma_next)
            case "renoise":
                return step_renoise(x, v, sigma, sigma_next, noise)
            case "cps":
                return step_cps(x, v, sigma, sigma_next, self.eta, noise)


@dataclass(frozen=True)
class State:
    """Where student samples stand on their way: the input of the step to be trained.

    Args:
        x_sigma: ``[B, C, H, W]``.
        sigma: ``[B]``.
        level: Which of the generator's levels, ``[B]``, 0 for pure noise.
    """

    x_sigma: Tensor
    sigma: Tensor
    level: Tensor


Streams = torch.Generator | Sequence[torch.Generator]
"""One random stream for a batch, or one for each of its rows, whose noise then knows nothing of the other rows."""


def draw_noise(shape: tuple[int, ...], generator: Streams, device: torch.device) -> Tensor:
    """Standard normal noise from a stream of its own; drawn on the CPU, so every device sees the same.

    Raises:
        ValueError: If there are several streams, and not one for each of the ``shape[0]`` rows.
    """
    if isinstance(generator, torch.Generator):
        return torch.randn(shape, generator=generator).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} streams for {shape[0]} rows of noise")
    return torch.stack([torch.randn(shape[1:], generator=stream) for stream in generator]).to(device)


@torch.no_grad()
def backward_simulation(
    predict: Predict,
    noise: Tensor,
    sigmas: Tensor,
    level: Tensor,
    sampler: FewStepSampler,
    generator: torch.Generator,
) -> State:
    """Bring each sample from pure noise to its own level with the student itself, without gradient.

    Args:
        predict: The student's velocity.
        noise: ``[B, C, H, W]``.
        sigmas: The sampler's levels and a final 0, ``[K + 1]``, on the CPU.
        level: The level at which each sample stops, ``[B]`` in ``0..K-1``, on the CPU: known before any step, so
            that each step evaluates only the samples that go on and no device is waited for.
        sampler: Kind of the steps.
        generator: Random stream of the steps' noise.

    Source: DMD2 (2405.14867), section 4.5.
    """
    x = sigmas[0].to(noise.dtype) * noise
    for i in range(int(level.max())):
        fresh = draw_noise(tuple(noise.shape), generator, noise.device)
        rows = torch.nonzero(level > i)[:, 0].to(noise.device)
        sigma = sigmas[i].to(x).expand(len(rows))
        v = predict(x[rows], sigma, rows)
        sigma_next = sigmas[i + 1].to(x).expand(len(rows))
        x = x.index_copy(0, rows, sampler.step(x[rows], v, sigma, sigma_next, fresh[rows]).sample.to(x.dtype))
    return State(x, sigmas[level].to(x), level)


@torch.no_grad()
def sample(
    predict: Predict, noise: Tensor, sigmas: Tensor, sampler: FewStepSampler, generator: Streams | None = None
) -> Tensor:
    """All steps from pure noise to ``x0``, ``[B, C, H, W]``.

    Raises:
        ValueError: If the sampler's kind needs fresh noise and there is no ``generator`` to draw it from.
    """
    if generator is None and sampler.kind != "ode":
        raise ValueError(f"the {sampler.kind} sampler needs a generator for its fresh noise")
    x = sigmas[0].to(noise.dtype) * noise
    rows = torch.arange(len(noise), device=noise.device)
    for here, below in zip(sigmas[:-1].to(x), sigmas[1:].to(x), strict=True):
        if generator is None:
            fresh = torch.zeros_like(noise)
        else:
            fresh = draw_noise(tuple(noise.shape), generator, noise.device)
        sigma, sigma_next = here.expand(len(x)), below.expand(len(x))
        x = sampler.step(x, predict(x, sigma, rows), sigma, sigma_next, fresh).sample
    return x
