"""Pictures to the pixels that published scorers expect, on tensors, so that gradient reaches the picture.

The originals resize PIL images, which rounds to 8 bits after each pass. Here nothing is rounded: pixels differ by about
one level of 8 bits, which a test measures.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from gdmd_lightning.errors import UserError

Channels = tuple[float, float, float]

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each channel; source: openai/CLIP."""
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each channel; source: openai/CLIP."""

TOLERANCE = 1e-3
"""How far pixels may be out of [0, 1]; a rounding error is none of the user's."""


def check_pictures(images: Tensor, texts: Sequence[str], where: str) -> None:
    """Check what a scorer is given; waits for the device. Pixels that are not finite are left to the judge.

    Raises:
        UserError: If there is no picture, not one prompt for each, or they are no ``[B, 3, H, W]`` of floats in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"pictures are {str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}",
            where=where,
            remedy="give floats of shape (B, 3, H, W) in [0, 1]",
        )
    if not len(images) or len(images) != len(texts):
        raise UserError(
            f"{len(images)} pictures and {len(texts)} prompts", where=where, remedy="give one prompt for each picture"
        )
    low, high = images.detach().flatten(1).aminmax(dim=1)
    outside = (low < -TOLERANCE) | (high > 1 + TOLERANCE)
    if bool(outside.any()):
        raise UserError(
            f"{int(outside.sum())} of {len(images)} pictures are out of range: {low.min().item():.4g} to "
            f"{high.max().item():.4g}, the first with prompt {texts[int(outside.nonzero()[0])]!r}",
            where=where,
            remedy="give pixels in [0, 1]",
        )


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as PIL; stays in [0, 1]."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def center_crop(images: Tensor, size: int) -> Tensor:
    """Resize the short side to ``size`` and cut out the middle: ``[B, 3, size, size]``.

    Source: openai/CLIP, ``_transform``.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    images = resized(images, size * height // short, size * width // short)
    top, left = ((side - size) // 2 for side in images.shape[-2:])
    return images[..., top : top + size, left : left + size]


def pad_square(images: Tensor, size: int) -> Tensor:
    """Resize the long side to ``size`` and pad the short one with black on both sides: ``[B, 3, size, size]``.

    Source: tgxs002/HPSv2, ``ResizeMaxSize``.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    images = resized(images, round(height * scale), round(width * scale))
    down, right = size - images.shape[-2], size - images.shape[-1]
    return F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))


def normalized(images: Tensor, mean: Channels = CLIP_MEAN, std: Channels = CLIP_STD) -> Tensor:
    """``(images - mean) / std`` of each channel."""
    return (images - images.new_tensor(mean)[:, None, None]) / images.new_tensor(std)[:, None, None]
