"""Directories of sampled pictures: ``000000-0.png`` is the first picture of the first prompt.

A picture depends on its row, its number, the seed, its size and the checkpoint only, not on the batch or on existing
pictures. So an incomplete directory is completed by sampling again. Prompts are streamed: no more than one batch of
them is in memory.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from gdmd_lightning.configuration.restore import picture_size
from gdmd_lightning.data.readers import PromptSource, is_endless, open_source
from gdmd_lightning.errors import UserError, without_middle
from gdmd_lightning.files import append_lines, atomic_file, write_atomically
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import content_digest
from gdmd_lightning.pictures import LIST, encode_png, picture_name, to_bytes
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.strategies.shards import is_sharded
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
        return picture_name(self.row, self.number)

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
        height, width: Size in pixels.
        teacher_steps: Steps of the teacher, or 0 for the averaged generator.
        guidance_scale: The teacher's guidance scale.
    """

    seed: int
    checkpoint: str
    digest: str
    height: int
    width: int
    teacher_steps: int = 0
    guidance_scale: float = 1.0

    def text_chunks(self) -> dict[str, str]:
        """The origin as PNG text chunks."""
        guided = f"teacher, {self.teacher_steps} steps, guidance {self.guidance_scale:g}"
        return {
            "seed": str(self.seed),
            "checkpoint": self.checkpoint,
            "checkpoint_digest": self.digest,
            "size": f"{self.width}x{self.height}",
            "sampled": guided if self.teacher_steps else "averaged generator",
        }


@dataclass(frozen=True)
class Wanted:
    """The requested pictures, streamed from the source of their prompts whenever they are iterated over.

    Args:
        source: Where the prompts come from.
        per_prompt: Pictures per prompt.
        count: Number of prompts; None for all.
    """

    source: PromptSource
    per_prompt: int = 1
    count: int | None = None

    def __iter__(self) -> Iterator[Picture]:
        for row, prompt in enumerate(islice(self.source.read(), self.count)):
            for number in range(self.per_prompt):
                yield Picture(row, number, prompt)


def wanted_pictures(
    source: str, column: str, split: str, count: int | None, per_prompt: int, tag: str | None = None
) -> Wanted:
    """Pictures of the first ``count`` prompts of a source, or of all.

    Raises:
        UserError: If the source cannot be read, or if it is endless and ``count`` is None.
    """
    opened = open_source(source, column=column, split=split, tag=tag)
    if count is None and is_endless(opened):
        raise UserError("this source is endless", where=source, remedy="give the number of prompts with --count")
    return Wanted(opened, per_prompt, count)


def open_checkpoint(path: str) -> tuple[str, tuple[int, int]]:
    """Digest of a checkpoint's content, and the height and width that it was trained at; reads no tensors.

    The digest is made of the checksums in the file's zip directory.

    Raises:
        UserError: If the file does not exist or is not a checkpoint of this project.
    """
    if os.path.isdir(path) and not is_sharded(path):
        raise UserError(
            f"{path!r} is a directory",
            where="checkpoint",
            remedy="give a .ckpt written by fit; sample an exported pipeline with diffusers itself",
        )
    return content_digest(path), picture_size(path)


@dataclass(frozen=True)
class Existing:
    """What a directory already has.

    Args:
        names: Readable pictures, whether wanted or not.
        wanted: Number of wanted pictures.
        missing: Number of wanted pictures that are absent or unreadable.
    """

    names: set[str]
    wanted: int
    missing: int


def existing_pictures(out: Path, wanted: Iterable[Picture], origin: Origin) -> Existing:
    """Compare a directory with all wanted pictures, before anything is made.

    Raises:
        UserError: If a row is not a prompt, or a picture has another origin or prompt than ``origin`` and ``wanted``
            give it.
    """
    here: dict[int, list[Path]] = defaultdict(list)
    for path in _listed(out):
        if match := FILE_NAME.fullmatch(path.name):
            here[int(match[1])].append(path)
    names: set[str] = set()
    total = missing = 0
    for picture in wanted:
        for path in here.pop(picture.row, ()):
            names |= _known(path, {**origin.text_chunks(), "prompt": picture.prompt.text})
        total += 1
        missing += picture.name not in names
    for path in (path for rest in here.values() for path in rest):
        names |= _known(path, origin.text_chunks())
    return Existing(names, total, missing)


def _listed(out: Path) -> list[Path]:
    try:
        return sorted(out.iterdir())
    except OSError:  # make_directory says why
        return []


def _known(path: Path, expected: dict[str, str]) -> set[str]:
    """The name of a picture, or nothing if it is unreadable; an error if it is not as expected."""
    chunks = _read_chunks(path)
    if chunks is None:
        return set()
    for key, value in expected.items():
        if chunks.get(key) != value:
            raise _foreign(path, key, chunks, value)
    return {path.name}


def _read_chunks(path: Path) -> dict[str, str] | None:
    """Text chunks of a picture, with its actual size, or None if it is truncated or damaged."""
    try:
        with Image.open(path) as image:
            chunks = {str(key): value for key, value in image.info.items()}
            chunks["size"] = f"{image.width}x{image.height}"
            image.verify()
    except (OSError, SyntaxError, ValueError):  # what PIL raises for a damaged file
        return None
    return chunks


def _foreign(path: Path, key: str, chunks: dict[str, str], here: str) -> UserError:
    if chunks.get(key) is None or "checkpoint" not in chunks:
        return UserError("not written by sample", where=str(path), remedy=ANOTHER_DIRECTORY)
    if key == "checkpoint_digest":
        return UserError("made with another checkpoint of the same name", where=str(path), remedy=ANOTHER_DIRECTORY)
    there, here = (repr(without_middle(text, QUOTED)) for text in (chunks[key], here))
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
    module: DistillationModule, wanted: Iterable[Picture], existing: Existing, origin: Origin, out: Path, batch: int
) -> None:
    """Make the missing pictures; write each complete or not at all, then add it to the list.

    Args:
        module: A module with its roles loaded.
        wanted: The requested pictures.
        existing: What ``out`` already has.
        origin: What the pictures have in common.
        out: An existing directory.
        batch: Pictures made at once; a killed process loses at most as many.
    """
    absent = (picture for picture in wanted if picture.name not in existing.names)
    done = existing.wanted - existing.missing
    with tqdm(desc="sampling", unit="picture", total=existing.wanted, initial=done) as bar:
        while pictures := list(islice(absent, batch)):
            pixels = to_bytes(generate(module, pictures, origin))
            for picture, one in zip(pictures, pixels, strict=True):
                chunks = {"prompt": picture.prompt.text, "method": type(module).__name__, **origin.text_chunks()}
                chunks |= {"row": str(picture.row), "number": str(picture.number)}
                write_atomically(out / picture.name, encode_png(one, chunks))
                append_lines(out / LIST, _line(picture, origin))
            bar.update(len(pictures))


def complete(
    out: Path,
    wanted: Iterable[Picture],
    existing: Existing,
    origin: Origin,
    load: Callable[[], DistillationModule],
    batch: int,
) -> float:
    """Make what a directory lacks, and list all wanted pictures.

    Args:
        out: An existing directory.
        wanted: The requested pictures, which are iterated over several times.
        existing: What ``out`` already has.
        origin: What the pictures have in common.
        load: Loads the module; called only if something is missing.
        batch: Pictures made at once.

    Returns:
        Seconds per picture made; 0 if none was.
    """
    seconds = 0.0
    if existing.missing:
        module = load()
        if existing.names or (out / LIST).exists():
            write_list((p for p in wanted if p.name in existing.names) if existing.names else (), origin, out)
        began = time.perf_counter()
        try:
            write_pictures(module, wanted, existing, origin, out, batch)
        except KeyboardInterrupt:
            print("run the same command again to continue")
            raise
        seconds = (time.perf_counter() - began) / existing.missing
    if existing.names:  # otherwise the list was written in the order of the prompts
        write_list(wanted, origin, out)
    return seconds


def write_list(pictures: Iterable[Picture], origin: Origin, out: Path) -> None:
    """List pictures in ``out`` as JSON lines: file, prompt, row, number, seed, size, and the prompt's metadata.

    Raises:
        WriteError: If the file cannot be written.
    """
    with atomic_file(out / LIST) as part:
        with part.open("wb") as file:
            for picture in pictures:
                file.write(_line(picture, origin))


def _line(picture: Picture, origin: Origin) -> bytes:
    row = {
        "file": picture.name,
        "prompt": picture.prompt.text,
        "row": picture.row,
        "number": picture.number,
        "seed": origin.seed,
        "height": origin.height,
        "width": origin.width,
    }
    metadata = {"metadata": picture.prompt.metadata} if picture.prompt.metadata else {}
    return json.dumps({**row, **metadata}, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
