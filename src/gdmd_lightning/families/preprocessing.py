"""Pictures to the pixels that published networks expect, on tensors, so that gradient reaches the picture.

The originals resize PIL images, which rounds to 8 bits after each pass. Here nothing is rounded: pixels differ by about
one level of 8 bits, which a test measures.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

Channels = tuple[float, float, float]

CLIP_MEAN: Channels = (0.48145466, 0.4578275, 0.40821073)
"""Mean of each channel; source: openai/CLIP."""
CLIP_STD: Channels = (0.26862954, 0.26130258, 0.27577711)
"""Standard deviation of each channel; source: openai/CLIP."""


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as PIL; stays in [0, 1]."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def center_crop(images: Tensor, size: int) -> Tensor:
    """Resize the short side to ``size`` and cut out the middle: ``[B, 3, size, size]``.

    Where the margin is odd, the smaller half is on top and on the left, as in transformers; torchvision, which
    openai/CLIP uses, rounds half of it to even.

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
