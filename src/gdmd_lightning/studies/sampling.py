"""Directories of sampled pictures: ``000000-0.png`` is the first picture of the first prompt.

A picture depends on its row, its number, the seed and the checkpoint only, not on the batch or on existing
pictures. So an incomplete directory is completed by sampling again.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from gdmd_lightning.data.readers import ShapesPrompts, open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.streams import draw_noise, stream

FILE_NAME = re.compile(r"(\d{6,})-(\d+)\.png")
QUOTED = 60  # characters of a prompt in a message
ANOTHER_DIRECTORY = "give another directory, or remove the pictures in this one"


@dataclass(frozen=True)
class Picture:
    """One requested picture.

    Args:
        row: Row of its prompt in the source, from 0.
        number: Number among the pictures of this prompt, from 0.
        prompt: The prompt.
    """

    row: int
    number: int
    prompt: Prompt

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.row:06d}-{self.number}.png"

    def rng(self, seed: int) -> torch.Generator:
        """Random stream of this picture: its initial noise, then the noise that a stochastic sampler adds."""
        return stream("picture", seed, self.row, self.number)


@dataclass(frozen=True)
class Origin:
    """What all pictures of a directory have in common.

    Args:
        seed: Determines a picture's noise, together with its row and number.
        checkpoint: The checkpoint's file name.
        digest: Digest of the checkpoint's content, since every run has a ``last.ckpt``.
        teacher_steps: Steps of the teacher, or 0 for the averaged generator.
        guidance_scale: The teacher's guidance scale.
    """

    seed: int
    checkpoint: str
    digest: str
    teacher_steps: int = 0
    guidance_scale: float = 1.0

    def text_chunks(self) -> dict[str, str]:
        """The origin as PNG text chunks."""
        guided = f"teacher, {self.teacher_steps} steps, guidance {self.guidance_scale:g}"
        return {
            "seed": str(self.seed),
            "checkpoint": self.checkpoint,
            "checkpoint_digest": self.digest,
            "sampled": guided if self.teacher_steps else "averaged generator",
        }


def checkpoint_digest(path: str) -> str:
    """Digest of a checkpoint's content, from the checksums in its zip directory; reads no tensors.

    Raises:
        UserError: If the file does not exist or is not a checkpoint.
    """
    if Path(path).is_dir():
        raise UserError(
            f"{path!r} is a directory",
            where="checkpoint",
            remedy="give a .ckpt written by fit; sample an exported pipeline with diffusers itself",
        )
    read_checkpoint(path, in_memory=False)
    with zipfile.ZipFile(path) as archive:
        parts = [f"{part.filename} {part.file_size} {part.CRC}" for part in archive.infolist()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def read_prompts(source: str, column: str, split: str, count: int | None) -> list[Prompt]:
    """The first ``count`` prompts of a source, or all of them.

    Raises:
        UserError: If a row is not a prompt, or if the source is endless and ``count`` is None.
    """
    opened = open_source(source, column=column, split=split)
    if count is None and isinstance(opened, ShapesPrompts):
        raise UserError("this source is endless", where=source, remedy="give the number of prompts with --count")
    return list(islice(opened.read(), count))


def existing_pictures(out: Path, wanted: Sequence[Picture], origin: Origin) -> set[str]:
    """Names of the readable pictures in ``out``; unreadable ones are left out, to be made again.

    Raises:
        UserError: If a picture has another origin or prompt than ``origin`` and ``wanted`` give it.
    """
    prompts = {picture.row: picture.prompt.text for picture in wanted}
    found = set()
    for path in sorted(out.glob("*.png")):
        match = FILE_NAME.fullmatch(path.name)
        chunks = None if match is None else _read_chunks(path)
        if match is None or chunks is None:
            continue
        expected = origin.text_chunks()
        if int(match[1]) in prompts:
            expected["prompt"] = prompts[int(match[1])]
        for key, value in expected.items():
            if chunks.get(key) != value:
                raise _foreign(path, key, chunks.get(key), value)
        found.add(path.name)
    return found


def _read_chunks(path: Path) -> dict[str | tuple[int, int], str] | None:
    """Text chunks of a picture, or None if it is truncated or damaged."""
    try:
        with Image.open(path) as image:
            chunks = dict(image.info)
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what PIL raises for a damaged file
        return None
    return chunks


def _foreign(path: Path, key: str, there: str | None, here: str) -> UserError:
    if there is None:
        return UserError("not written by sample", where=str(path), remedy=ANOTHER_DIRECTORY)
    if key == "checkpoint_digest":
        return UserError("made with another checkpoint of the same name", where=str(path), remedy=ANOTHER_DIRECTORY)
    there, here = (repr(text if len(text) <= QUOTED else f"{text[:QUOTED]}...") for text in (there, here))
    return UserError(f"made with {key} {there}, not {here}", where=str(path), remedy=ANOTHER_DIRECTORY)


def generate(module: DistillationModule, wanted: Sequence[Picture], origin: Origin) -> Tensor:
    """Generate pictures ``[B, 3, H, W]`` in [0, 1], each from its own random stream.

    Raises:
        UserError: If the batch does not fit into the device's memory, or a picture is not finite.
    """
    rngs = [picture.rng(origin.seed) for picture in wanted]
    texts = [picture.prompt.text for picture in wanted]
    try:
        noise = draw_noise((len(wanted), *module.latent_shape), rngs, module.device)
        if origin.teacher_steps:
            images = module.generate_teacher(noise, texts, origin.teacher_steps, origin.guidance_scale)
        else:
            images = module.generate(noise, texts, rngs=rngs)
        finite = images.isfinite().flatten(1).all(1).tolist()
    except torch.OutOfMemoryError as error:
        reason = f"{len(wanted)} pictures do not fit on {module.device}"
        raise UserError(reason, where="sample", remedy="use a smaller --batch_size") from error
    if not all(finite):
        name = wanted[finite.index(False)].name
        raise UserError(f"picture {name} is not finite", where="checkpoint", remedy="use an earlier one of this run")
    return images


def write_pictures(
    module: DistillationModule, missing: Sequence[Picture], origin: Origin, out: Path, batch_size: int, existing: int
) -> None:
    """Make pictures and write each complete or not at all.

    Args:
        module: A module with its roles loaded.
        missing: The pictures to make, in this order.
        origin: Seed and checkpoint.
        out: An existing directory.
        batch_size: Pictures made at once; a killed process loses at most one batch.
        existing: Pictures that exist already, for the progress bar.
    """
    with tqdm(desc="sampling", unit="picture", total=existing + len(missing), initial=existing) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            pixels = (255 * generate(module, batch, origin)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
            for picture, one in zip(batch, pixels, strict=True):
                chunks = {"prompt": picture.prompt.text, "method": type(module).__name__, **origin.text_chunks()}
                write_atomically(out / picture.name, encode_png(one, chunks))
            bar.update(len(batch))


def encode_png(pixels: Tensor, chunks: dict[str, str]) -> bytes:
    """A PNG file.

    Args:
        pixels: ``[H, W, 3]``, 8 bits.
        chunks: Text chunks by their keys.
    """
    info, file = PngInfo(), io.BytesIO()
    for key, value in chunks.items():
        info.add_text(key, value)
    Image.fromarray(pixels.numpy()).save(file, "PNG", pnginfo=info)
    return file.getvalue()


def write_list(pictures: Sequence[Picture], seed: int, path: Path) -> None:
    """List pictures as JSON lines: file, prompt, seed, and the prompt's metadata if it has any.

    Raises:
        WriteError: If the file cannot be written.
    """
    lines = []
    for picture in pictures:
        metadata = {"metadata": picture.prompt.metadata} if picture.prompt.metadata else {}
        row = {"file": picture.name, "prompt": picture.prompt.text, "seed": seed, **metadata}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines))
