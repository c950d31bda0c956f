"""Real images of prompts, for methods with a GAN: a folder of captioned images, or the Shapes world."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gdmd_lightning.constructed import Constructed
from gdmd_lightning.data.rows import numbered_rows, parsed
from gdmd_lightning.errors import UserError
from gdmd_lightning.pictures import read_picture
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.scenes import render, sample_scenes


class ImageSource(Constructed, ABC):
    """Gives a real image for each prompt; which one, if there are several, a random stream decides."""

    @abstractmethod
    def check(self, data: Any) -> None:
        """Check that there are images for the prompts of a data module, before anything is loaded.

        Raises:
            UserError: If a prompt has none.
        """

    @abstractmethod
    def draw(self, prompts: Sequence[Prompt], height: int, width: int, rngs: Sequence[torch.Generator]) -> Tensor:
        """Images ``[B, 3, height, width]`` in [0, 1] of ``B`` prompts, on the CPU.

        Args:
            prompts: ``B`` of them.
            height, width: In pixels.
            rngs: One random stream per prompt.

        Raises:
            UserError: If a prompt has no image, or a file is not one.
        """


class ShapesImages(ImageSource):
    """Pictures of the Shapes world, a new one for each prompt, from its metadata; 32 pixels wide and high."""

    def check(self, data: Any) -> None:
        if data.source != "shapes":
            raise UserError(
                f"ShapesImages cannot draw the prompts of {data.source!r}",
                where="model.images",
                remedy="use data.source: shapes, or CaptionedImages",
            )

    def draw(self, prompts: Sequence[Prompt], height: int, width: int, rngs: Sequence[torch.Generator]) -> Tensor:
        if (height, width) != (32, 32):
            raise UserError(
                f"pictures of Shapes have 32x32 pixels, not {height}x{width}",
                where="model.images",
                remedy="set model.height and model.width to 32",
            )
        seeds = (int(torch.randint(2**62, (1,), generator=rng)) for rng in rngs)
        scenes = (
            sample_scenes([prompt.metadata], np.random.default_rng(seed))
            for prompt, seed in zip(prompts, seeds, strict=True)
        )
        return torch.cat([render(scene) for scene in scenes])


class CaptionedImages(ImageSource):
    """A folder of images with a ``metadata.jsonl``: in each line ``file_name`` and ``text``, the caption.

    The captions must be the training prompts, so that real and generated images are judged under the same text; the
    same file can be the source of the prompts (``data: {source: FOLDER/metadata.jsonl, column: text}``). Images are
    turned as their EXIF data say, scaled to cover the resolution and cropped at their center.

    Args:
        path: The folder.

    Raises:
        UserError: If there is no readable ``metadata.jsonl``, or a file that it names is missing.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        if not (self.path / "metadata.jsonl").is_file():
            raise UserError(
                f"{path!r} has no metadata.jsonl",
                where="model.images.path",
                remedy='give a folder with one, in each line {"file_name": ..., "text": ...}',
            )

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """Files by caption, in the order of the lines."""
        found: dict[str, list[Path]] = {}
        metadata = self.path / "metadata.jsonl"
        for number, line in numbered_rows(str(metadata)):
            where = f"{metadata}:{number}"
            row = parsed(line, where)
            text, name = (row.get("text"), row.get("file_name")) if isinstance(row, dict) else (None, None)
            if not isinstance(text, str) or not isinstance(name, str):
                remedy = 'write {"file_name": ..., "text": ...}'
                raise UserError("not a captioned image", where=where, remedy=remedy)
            if not (self.path / name).is_file():
                raise UserError(f"no such file: {str(self.path / name)!r}", where=where)
            found.setdefault(text, []).append(self.path / name)
        return found

    def check(self, data: Any) -> None:
        for text in data.texts():
            self._files_of(text)

    def draw(self, prompts: Sequence[Prompt], height: int, width: int, rngs: Sequence[torch.Generator]) -> Tensor:
        images = []
        for prompt, rng in zip(prompts, rngs, strict=True):
            files = self._files_of(prompt.text)
            chosen = int(torch.randint(len(files), (1,), generator=rng))
            images.append(read_image(files[chosen], height, width))
        return torch.stack(images)

    def _files_of(self, text: str) -> list[Path]:
        if text not in self.files:
            raise UserError(
                f"no image has the caption {text[:80]!r}",
                where=str(self.path / "metadata.jsonl"),
                remedy="train on the captions: data.source and data.column",
            )
        return self.files[text]


def read_image(path: Path, height: int, width: int) -> Tensor:
    """An image file as ``[3, height, width]`` in [0, 1], scaled to cover that size and cropped at its center.

    Raises:
        UserError: As :func:`gdmd_lightning.pictures.read_picture`.
    """
    from PIL import Image, ImageOps

    fitted = ImageOps.fit(read_picture(path), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(fitted).copy()).permute(2, 0, 1) / 255
