"""The adversarial part of DMD2: its settings, and the latents that the discriminator compares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import Conditioning, NoisyLatents
from gdmd_lightning.schedules import RenoiseDistribution, Uniform, draw_renoise_sigmas, renoise
from gdmd_lightning.streams import draw_noise


@dataclass(frozen=True)
class GAN:
    """The adversarial part.

    Args:
        generator_weight: Weight of the generator's loss, at least 0.
        fake_score_weight: Weight of the loss of fake score and discriminator, at least 0.
        hidden: Width of the discriminator's layer, at least 1.
        renoise_distribution: Levels at which real and generated images are compared.

    Raises:
        UserError: If a value is out of range.

    Source: DMD2's code for SDXL: 5e-3 and 1e-2.
    """

    generator_weight: float = 5e-3
    fake_score_weight: float = 1e-2
    hidden: int = 256
    renoise_distribution: RenoiseDistribution = field(default_factory=Uniform)

    def __post_init__(self) -> None:
        for name, least in (("generator_weight", 0), ("fake_score_weight", 0), ("hidden", 1)):
            if not getattr(self, name) >= least:
                value = getattr(self, name)
                raise UserError(f"{name} is {value}", where=f"model.gan.{name}", remedy=f"use at least {least}")


@dataclass(frozen=True)
class GANDraw:
    """Levels and noise at which a batch of real and generated latents is compared.

    Args:
        sigma: Shared by the real and the generated latents of a row, ``[B]``.
        eps_real, eps_fake: Standard normal, ``[B, C, H, W]`` each.
    """

    sigma: Tensor
    eps_real: Tensor
    eps_fake: Tensor

    @classmethod
    def of(
        cls, gan: GAN, rows: int, shape: tuple[int, int, int], rng: torch.Generator, device: torch.device
    ) -> GANDraw:
        """Draw for ``rows`` latents of a shape ``(C, H, W)``; levels are stratified over the batch."""
        sigma = draw_renoise_sigmas(gan.renoise_distribution, 1, rows, rng)[0]
        eps_real, eps_fake = (draw_noise((rows, *shape), rng, device) for _ in range(2))
        return cls(sigma.to(eps_real), eps_real, eps_fake)

    def renoised(self, x: Tensor, eps: Tensor, rows: slice, conditioning: Conditioning) -> NoisyLatents:
        """Latents ``x`` of the given rows, noised with their part of ``eps``."""
        sigma = self.sigma[rows]
        return NoisyLatents(renoise(x, sigma, eps[rows]), sigma, conditioning)
