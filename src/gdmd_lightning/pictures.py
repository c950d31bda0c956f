"""Pictures as files: 8 bits, PNG, and the list of a directory's pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

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


def read_picture(path: Path) -> Image:
    """A picture file of any format in RGB, 8 bits, turned as its EXIF data say.

    Raises:
        UserError: If it is not readable, or has more than 8 bits in a channel: they would be cut, not scaled.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode})")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"not a readable image: {error}", where=str(path)) from error
