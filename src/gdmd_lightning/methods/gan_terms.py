"""The adversarial part of DMD2: its settings, and the latents that the discriminator compares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from gdmd_lightning.latents import Conditioning, NoisyLatents
from gdmd_lightning.ranges import Count, NonNegative, ranged
from gdmd_lightning.schedules import RenoiseDistribution, Uniform, draw_spread_sigmas, renoise
from gdmd_lightning.streams import BatchStream, draw_noise


@ranged
@dataclass(frozen=True)
class GAN:
    """The adversarial part.

    Args:
        generator_weight: Weight of the generator's loss.
        fake_score_weight: Weight of the loss of fake score and discriminator.
        hidden: Width of the discriminator's layer.
        renoise_distribution: Levels at which real and generated images are compared.

    Source: DMD2's code for SDXL: 5e-3 and 1e-2.
    """

    generator_weight: NonNegative = 5e-3
    fake_score_weight: NonNegative = 1e-2
    hidden: Count = 256
    renoise_distribution: RenoiseDistribution = field(default_factory=Uniform)


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
    def of(cls, gan: GAN, rows: int, shape: tuple[int, int, int], rng: BatchStream, device: torch.device) -> GANDraw:
        """Draw for ``rows`` latents of a shape ``(C, H, W)``; levels are stratified over the batch."""
        sigma = draw_spread_sigmas(gan.renoise_distribution, rows, rng)
        eps_real, eps_fake = (draw_noise((rows, *shape), rng, device) for _ in range(2))
        return cls(sigma.to(eps_real), eps_real, eps_fake)

    def renoised(self, x: Tensor, eps: Tensor, rows: slice, conditioning: Conditioning) -> NoisyLatents:
        """Latents ``x`` of the given rows, noised with their part of ``eps``."""
        sigma = self.sigma[rows]
        return NoisyLatents(renoise(x, sigma, eps[rows]), sigma, conditioning)
