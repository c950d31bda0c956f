"""Prompts in, pictures out: ``OUT/000000-0.png`` is the first picture of the first prompt.

The picture of a prompt's row and number is a function of those, the seed and the checkpoint, whatever the batch and
whatever was there before; so a directory that was left half full is filled by the same command.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.data.readers import ShapesPrompts, open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.samplers import draw_noise

PICTURE = re.compile(r"(\d{6,})-(\d+)\.png")
TOLD = 60  # letters of a prompt in a message


@dataclass(frozen=True)
class Wanted:
    """One picture that is asked for.

    ``row`` is its prompt's in the source, ``number`` tells the prompt's pictures apart; both count from 0.
    """

    row: int
    number: int
    prompt: Prompt

    @property
    def name(self) -> str:
        """The file's name."""
        return f"{self.row:06d}-{self.number}.png"


@dataclass(frozen=True)
class Origin:
    """What the pictures of one directory have in common.

    Args:
        seed: With a picture's row and number it determines all its noise.
        checkpoint: The checkpoint's file name.
        digest: Of the checkpoint's content: every run calls its own ``last.ckpt``.
        teacher_steps: Steps of the teacher, or 0 for the averaged generator.
        guidance_scale: Of the teacher.
    """

    seed: int
    checkpoint: str
    digest: str
    teacher_steps: int = 0
    guidance_scale: float = 1.0

    def written(self) -> dict[str, str]:
        """What a picture's text chunks say of it."""
        guided = f"teacher, {self.teacher_steps} steps, guidance {self.guidance_scale:g}"
        return {
            "seed": str(self.seed),
            "checkpoint": self.checkpoint,
            "checkpoint_digest": self.digest,
            "sampled": guided if self.teacher_steps else "averaged generator",
        }


def checkpoint_digest(path: str) -> str:
    """A digest of a checkpoint's content, from the checksums that its zip directory holds: no tensor is read.

    Raises:
        UserError: If there is no such checkpoint, or it is not one.
    """
    if Path(path).is_dir():
        raise UserError(
            f"{path!r} is a directory",
            where="checkpoint",
            remedy="give a .ckpt that fit has written; an exported pipeline is sampled with diffusers itself",
        )
    read_checkpoint(path, in_memory=False)
    with zipfile.ZipFile(path) as archive:
        parts = [f"{part.filename} {part.file_size} {part.CRC}" for part in archive.infolist()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def picture_stream(seed: int, row: int, number: int) -> torch.Generator:
    """The random stream of one picture: its initial noise first, then what a stochastic sampler adds."""
    digest = hashlib.blake2b(f"picture/{seed}/{row}/{number}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def read_prompts(source: str, column: str, split: str, count: int | None) -> list[Prompt]:
    """The first ``count`` prompts of a source, or all.

    Raises:
        UserError: If a row is not a prompt, or an endless source comes without ``count``.
    """
    opened = open_source(source, column=column, split=split)
    if count is None and isinstance(opened, ShapesPrompts):
        raise UserError("it has no end", where=source, remedy="say how many of its prompts with --count")
    return list(islice(opened.read(), count))


def already_there(out: Path, wanted: Sequence[Wanted], origin: Origin) -> set[str]:
    """Names of the whole pictures in ``out``; one that is not readable is made again.

    Raises:
        UserError: If a picture there has another origin or prompt than this call would give it.
    """
    prompts = {picture.row: picture.prompt.text for picture in wanted}
    found = set()
    for path in sorted(out.glob("*.png")):
        match = PICTURE.fullmatch(path.name)
        if match is None:
            continue
        try:
            with Image.open(path) as image:
                told = dict(image.info)
                image.verify()
        except (OSError, SyntaxError, ValueError):  # what PIL raises of a file that is cut or damaged
            continue
        right = origin.written()
        if int(match[1]) in prompts:
            right["prompt"] = prompts[int(match[1])]
        for key, value in right.items():
            if told.get(key) != value:
                raise _foreign(path, key, told.get(key), value)
        found.add(path.name)
    return found


def _foreign(path: Path, key: str, there: str | None, here: str) -> UserError:
    remedy = "give another directory, or remove the pictures that are there"
    if there is None:
        return UserError("it is no picture of this command", where=str(path), remedy=remedy)
    if key == "checkpoint_digest":
        return UserError("it was made with another checkpoint of the same name", where=str(path), remedy=remedy)
    there, here = (repr(text if len(text) <= TOLD else f"{text[:TOLD]}...") for text in (there, here))
    return UserError(f"it was made with {key} {there}, not {here}", where=str(path), remedy=remedy)


def generate(module: DistillationModule, wanted: Sequence[Wanted], origin: Origin) -> Tensor:
    """The pictures ``[B, 3, H, W]`` in [0, 1], each from its own stream.

    Raises:
        UserError: If the batch does not fit into the device's memory, or a picture is not finite.
    """
    streams = [picture_stream(origin.seed, picture.row, picture.number) for picture in wanted]
    texts = [picture.prompt.text for picture in wanted]
    try:
        noise = draw_noise((len(wanted), *module.latent_shape), streams, module.device)
        if origin.teacher_steps:
            images = module.generate_teacher(noise, texts, origin.teacher_steps, origin.guidance_scale)
        else:
            images = module.generate(noise, texts, streams=streams)
        finite = images.isfinite().flatten(1).all(1).tolist()
    except torch.OutOfMemoryError as error:
        remedy = "use a smaller --batch_size"
        raise UserError(
            f"{len(wanted)} pictures do not fit on {module.device}", where="sample", remedy=remedy
        ) from error
    if not all(finite):
        name = wanted[finite.index(False)].name
        raise UserError(f"picture {name} is not finite", where="checkpoint", remedy="use one from earlier in the run")
    return images


def fill(
    module: DistillationModule, missing: Sequence[Wanted], origin: Origin, out: Path, batch_size: int, there: int = 0
) -> None:
    """Make pictures and write each whole or not at all.

    Args:
        missing: What to make, in this order.
        out: An existing directory.
        batch_size: Pictures made at once; a process that is killed loses no more.
        there: How many pictures are there already, for the bar.
    """
    with tqdm(desc="sampling", unit="picture", total=there + len(missing), initial=there) as bar:
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            levels = (255 * generate(module, batch, origin)).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
            for picture, pixels in zip(batch, levels, strict=True):
                told = {"prompt": picture.prompt.text, "method": type(module).__name__, **origin.written()}
                write_whole(out / picture.name, _png(pixels, told))
            bar.update(len(batch))


def _png(pixels: Tensor, told: dict[str, str]) -> bytes:
    chunks, file = PngInfo(), io.BytesIO()
    for key, value in told.items():
        chunks.add_text(key, value)
    Image.fromarray(pixels.numpy()).save(file, "PNG", pnginfo=chunks)
    return file.getvalue()


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the place, then move there.

    Raises:
        UserError: If the disk is full, or does not take the file for another reason.
    """
    fresh = path.with_name(path.name + ".part")
    try:
        with fresh.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except OSError as error:
        remedy = "make room and run the same command again: it goes on where it stopped"
        raise UserError(f"cannot be written: {error.strerror}", where=str(path), remedy=remedy) from error
    finally:
        fresh.unlink(missing_ok=True)


def _listed(wanted: Sequence[Wanted], seed: int) -> bytes:
    lines = []
    for picture in wanted:
        metadata = {"metadata": picture.prompt.metadata} if picture.prompt.metadata else {}
        row = {"file": picture.name, "prompt": picture.prompt.text, "seed": seed, **metadata}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def _usable(device: str | None) -> str:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # torch's own for a name it does not know, and for no CUDA
        reason = str(error).split("\n")[0]
        raise UserError(f"{chosen!r} cannot be used: {reason}", where="--device", remedy="use cpu or cuda") from error
    return chosen


def _make_directory(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        remedy = "give a directory that you may write to"
        raise UserError(f"cannot be written to: {error.strerror}", where=str(out), remedy=remedy) from error


def main(arguments: list[str]) -> int:
    """``sample CHECKPOINT PROMPTS OUT``."""
    about = f"{__doc__}\nA pipeline directory that export has written needs no command: diffusers samples it as it is."
    parser = ArgumentParser(prog="gdmd_lightning sample", description=about, exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="a .ckpt that fit has written")
    parser.add_argument(
        "prompts", type=str, help="a .txt, .jsonl, .csv or .parquet file, a Hugging Face data set, or shapes"
    )
    parser.add_argument("out", type=Path, help="directory of the pictures; those that are there are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures made at once")
    parser.add_argument("--per_prompt", type=int, default=1, help="pictures of each prompt")
    parser.add_argument("--count", type=int | None, default=None, help="only so many prompts, the first")
    parser.add_argument("--column", type=str, default="prompt", help="key or column that holds the prompt")
    parser.add_argument("--split", type=str, default="train", help="of a Hugging Face data set, or of shapes")
    parser.add_argument("--teacher_steps", type=int, default=0, help="sample the teacher instead, in so many steps")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="of the teacher")
    parser.add_argument("--device", type=str | None, default=None, help="cuda if there is one, else cpu")
    options = parser.parse_args(arguments)
    for name, least in (("batch_size", 1), ("per_prompt", 1), ("count", 1), ("teacher_steps", 0)):
        if options[name] is not None and options[name] < least:
            raise UserError(f"{options[name]} is too few", where=f"--{name}", remedy=f"use at least {least}")
    out: Path = options.out
    if os.path.exists(out) and not os.path.isdir(out):  # unlike Path's, no error where a parent may not be searched
        raise UserError("it is a file", where=str(out), remedy="give a directory")
    device = _usable(options.device)
    origin = Origin(
        options.seed,
        Path(options.checkpoint).name,
        checkpoint_digest(options.checkpoint),
        options.teacher_steps,
        options.guidance_scale,
    )
    prompts = read_prompts(options.prompts, options.column, options.split, options.count)
    wanted = [Wanted(row, n, prompt) for row, prompt in enumerate(prompts) for n in range(options.per_prompt)]
    there = already_there(out, wanted, origin)
    missing = [picture for picture in wanted if picture.name not in there]
    _make_directory(out)
    seconds = 0.0
    if missing:
        module = load_module(options.checkpoint, device)
        began = time.perf_counter()
        try:
            fill(module, missing, origin, out, options.batch_size, len(wanted) - len(missing))
        except KeyboardInterrupt:
            print("stopped by a signal; the same command goes on")
            return 130
        seconds = (time.perf_counter() - began) / len(missing)
    write_whole(out / "pictures.jsonl", _listed(wanted, origin.seed))
    print(f"pictures: {out} ({len(missing)} made, {len(wanted) - len(missing)} there before)")
    print(f"seconds a picture: {seconds:.3f}" if missing else "nothing was left to make")
    return 0
