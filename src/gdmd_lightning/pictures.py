"""Pictures as files: 8 bits, PNG, and the list of a directory's pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor

LIST = "pictures.jsonl"
"""The list of a directory's pictures: file, prompt, row and number, seed, and what else is known of each."""


def picture_name(row: int, number: int) -> str:
    """File name of a picture: the row of its prompt, and its number among the pictures of this prompt, from 0."""
    return f"{row:06d}-{number}.png"


def to_bytes(images: Tensor) -> Tensor:
    """Pictures ``[B, 3, H, W]`` in [0, 1] as ``[B, H, W, 3]`` of 8 bits, on the CPU."""
    return (255 * images).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def encode_png(pixels: Tensor, chunks: Mapping[str, str]) -> bytes:
    """A PNG file.

    Args:
        pixels: ``[H, W, 3]``, 8 bits.
        chunks: Text chunks by their keys.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_text(key, value)
    Image.fromarray(pixels.numpy()).save(file, "PNG", pnginfo=info)
    return file.getvalue()
