"""Velocity policies on renoised samples, for use in any method: their settings, and the loss at one level.

Source: DiffusionNFT (2509.16117).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import Conditioning, NoisyLatents
from gdmd_lightning.objectives.policy import nft_loss, policy_pair
from gdmd_lightning.ranges import Count, Decay, NonNegative, Positive, Whole, ranged
from gdmd_lightning.roles import Roles
from gdmd_lightning.schedules import renoise
from gdmd_lightning.streams import BatchStream, draw_noise, draw_uniform


@ranged
@dataclass(frozen=True)
class DecayRamp:
    """Decay of an average that rises with the updates: ``min(slope (update - start), limit)``, 0 before ``start``.

    Args:
        slope: Rise per update, at least 0.
        limit: Largest decay, in [0, 1).
        start: Update at which it begins to rise, at least 0.

    Raises:
        UserError: If a value is out of range.

    Source: DiffusionNFT's code: slope 0.001 up to 0.5, or from 75 at 0.0075 up to 0.999.
    """

    slope: NonNegative = 0.001
    limit: Decay = 0.5
    start: Whole = 0

    def __call__(self, update: int) -> float:
        """The decay after update number ``update``, counted from 0."""
        return min(self.slope * max(update - self.start, 0), self.limit)


@ranged
@dataclass(frozen=True)
class NFT:
    """Positive and negative velocity policies on renoised samples of full rollouts.

    Args:
        beta: Strength of the mixture, above 0.
        advantage_clip: ``A_max``, above 0.
        train_steps: Number of the generator's levels, different ones for each sample, to which its sample is renoised
            in an update; null for all.
        old_decay: Decay of the old policy, which takes the rollouts.

    Raises:
        UserError: If a value is out of range.

    Source: DiffusionNFT (2509.16117): ``beta`` 1, or 0.1 for several rewards; advantages clipped at 5.
    """

    beta: Positive = 1.0
    advantage_clip: Positive = 5.0
    train_steps: Count | None = None
    old_decay: DecayRamp = field(default_factory=DecayRamp)

    def check_steps(self, steps: int) -> None:
        """Fail if a generator of this many steps has too few levels.

        Raises:
            UserError: If it has.
        """
        if self.train_steps is not None and self.train_steps > steps:
            raise UserError(
                f"it is {self.train_steps}, but the generator has {steps} steps",
                where="model.nft.train_steps",
                remedy=f"use 1 to {steps}, or null for all",
            )

    def draw_steps(self, batch: int, steps: int, rng: BatchStream) -> Tensor:
        """Step indices to train in an update, ``[B, train_steps]``, different ones in each row, on the CPU."""
        return draw_uniform((batch, steps), rng).argsort(1)[:, : self.train_steps]


def renoised_samples(x0: Tensor, sigma: Tensor, conditioning: Conditioning, rng: BatchStream) -> NoisyLatents:
    """Samples ``[B, C, H, W]`` renoised to levels ``sigma`` ``[B]`` with fresh noise."""
    sigma = sigma.to(x0)
    return NoisyLatents(renoise(x0, sigma, draw_noise(tuple(x0.shape), rng, x0.device)), sigma, conditioning)


def nft_term(roles: Roles, nft: NFT, x0: Tensor, latents: NoisyLatents, o: Tensor) -> tuple[Tensor, Tensor]:
    """DiffusionNFT's loss on judged samples renoised once each.

    Args:
        roles: Include ``generator``, which is learning, and ``old``.
        nft: Settings.
        x0: Judged samples, ``[B, C, H, W]``.
        latents: The samples renoised, ``B`` rows.
        o: Optimalities, ``[B]``, in [0, 1].

    Returns:
        The loss, and the generator's velocity with gradient.
    """
    v, v_old = (roles.velocity(role, latents) for role in ("generator", "old"))
    plus, minus = (latents.x0(velocity) for velocity in policy_pair(v, v_old, nft.beta))
    return nft_loss(plus, minus, x0, o, nft.beta, nft.advantage_clip), v
