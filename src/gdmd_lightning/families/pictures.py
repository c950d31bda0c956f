"""The check of decoded pictures: whoever judges or shows them would otherwise be blamed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError


class NonFinitePictures(UserError):
    """Pictures with pixels that are NaN or infinite.

    Args:
        rows: Which of the pictures are wrong, ``[B]``.
        texts: Their prompts.
        latents: What they were decoded from, ``[B, C, H, W]``, if known: says whether the generator or the
            autoencoder is wrong.
    """

    def __init__(self, rows: Tensor, texts: Sequence[str], latents: Tensor | None = None) -> None:
        self.rows, self.texts = rows, texts
        first = int(rows.nonzero()[0])
        who, remedy = "decoded pictures", "not the reward, but the generator or the autoencoder is wrong"
        if latents is not None:
            if bool(torch.isfinite(latents.detach()).all()):
                who, remedy = "autoencoder", "its latents are finite; set the family's dtype to bfloat16 or float32"
            else:
                who, remedy = "generator", "its latents are not finite either; lower the learning rates"
        super().__init__(
            f"{int(rows.sum())} of {len(rows)} pictures are not finite, the first with prompt {texts[first]!r}",
            where=who,
            remedy=remedy,
        )


def not_finite(images: Tensor) -> Tensor:
    """Which of the images ``[B, 3, H, W]`` have a pixel that is not finite, ``[B]`` on their device."""
    return ~torch.isfinite(images.detach()).flatten(1).all(1)


def check_pictures(images: Tensor, texts: Sequence[str], latents: Tensor) -> None:
    """Fail if a picture is not finite; waits for the device.

    Raises:
        NonFinitePictures: If one is not.
    """
    rows = not_finite(images)
    if bool(rows.any()):
        raise NonFinitePictures(rows, texts, latents)
