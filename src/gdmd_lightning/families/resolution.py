"""Which picture sizes a pipeline can make, from the configurations of its network and autoencoder alone."""

from __future__ import annotations

from dataclasses import dataclass

from gdmd_lightning.errors import UserError


@dataclass(frozen=True)
class Grid:
    """How a network sees a picture: as a grid of patches of latents.

    Args:
        autoencoder: Pixels per latent, on each side.
        patch: Latents per patch, on each side.
        most: Number of patches on each side that the network has positions for; ``None`` for any number.
    """

    autoencoder: int
    patch: int = 1
    most: int | None = None

    @property
    def unit(self) -> int:
        """Pixels per patch, on each side."""
        return self.autoencoder * self.patch

    def check(self, height: int, width: int) -> None:
        """Fail if pictures of this size, in pixels, cannot be made.

        Raises:
            UserError: If a side is not a multiple of a patch, or the network has too few positions.
        """
        unit = self.unit
        if height % unit or width % unit or min(height, width) < unit:
            raise UserError(
                f"{height}x{width} is not a multiple of {unit} pixels",
                where="resolution",
                remedy=f"use a multiple of {unit}: autoencoder {self.autoencoder}, patch {self.patch}",
            )
        if self.most is not None and max(height, width) > self.most * unit:
            raise UserError(
                f"{height}x{width} needs more positions than the network has",
                where="resolution",
                remedy=f"use at most {self.most * unit} pixels on a side: {self.most} patches of {unit}",
            )


def autoencoder_factor(block_out_channels: list[int]) -> int:
    """Pixels per latent of an ``AutoencoderKL``, each of whose blocks but the first halves the size."""
    return 2 ** (len(block_out_channels) - 1)
