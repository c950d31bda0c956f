"""Sample a checkpoint: prompts in, pictures out.

``OUT/000000-0.png`` is the first picture of the first prompt. Run the same command again to complete a directory:
a picture depends on its prompt's row, its number, the seed and the checkpoint only.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import make_directory
from gdmd_lightning.studies.sampling import (
    Origin,
    Picture,
    checkpoint_digest,
    existing_pictures,
    read_prompts,
    write_list,
    write_pictures,
)

MINIMUM = {"batch_size": 1, "per_prompt": 1, "count": 1, "teacher_steps": 0}


def main(arguments: list[str]) -> int:
    """``sample CHECKPOINT PROMPTS OUT``."""
    options = _parse(arguments)
    out, device = options.out, _usable(options.device)
    digest = checkpoint_digest(options.checkpoint)
    name = Path(options.checkpoint).name
    origin = Origin(options.seed, name, digest, options.teacher_steps, options.guidance_scale)
    prompts = read_prompts(options.prompts, options.column, options.split, options.count)
    wanted = [Picture(row, n, prompt) for row, prompt in enumerate(prompts) for n in range(options.per_prompt)]
    names = existing_pictures(out, wanted, origin)
    missing = [picture for picture in wanted if picture.name not in names]
    existing = len(wanted) - len(missing)
    make_directory(out)
    seconds = 0.0
    if missing:
        module = load_module(options.checkpoint, device, role="ema")
        began = time.perf_counter()
        try:
            write_pictures(module, missing, origin, out, options.batch_size, existing)
        except KeyboardInterrupt:
            print("run the same command again to continue")
            raise
        seconds = (time.perf_counter() - began) / len(missing)
    write_list(wanted, origin.seed, out / "pictures.jsonl")
    print(f"pictures: {out} ({len(missing)} made, {existing} existed)")
    print(f"seconds per picture: {seconds:.3f}" if missing else "all pictures existed")
    return 0


def _parse(arguments: list[str]) -> Namespace:
    about = f"{__doc__}\nA pipeline directory written by export needs no command: sample it with diffusers."
    parser = ArgumentParser(prog="gdmd_lightning sample", description=about, exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="a .ckpt written by fit")
    parser.add_argument(
        "prompts", type=str, help="a .txt, .jsonl, .csv or .parquet file, a Hugging Face data set, or shapes"
    )
    parser.add_argument("out", type=Path, help="directory of the pictures; existing ones are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures made at once")
    parser.add_argument("--per_prompt", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--count", type=int | None, default=None, help="use only the first COUNT prompts")
    parser.add_argument("--column", type=str, default="prompt", help="key or column that holds the prompt")
    parser.add_argument("--split", type=str, default="train", help="split of a Hugging Face data set, or of shapes")
    parser.add_argument("--teacher_steps", type=int, default=0, help="sample the teacher instead, in this many steps")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="guidance scale of the teacher")
    parser.add_argument("--device", type=str | None, default=None, help="default: cuda if available, else cpu")
    options = parser.parse_args(arguments)
    for name, least in MINIMUM.items():
        if options[name] is not None and options[name] < least:
            raise UserError(f"{options[name]} is too small", where=f"--{name}", remedy=f"use at least {least}")
    # os.path, unlike Path, raises no error if a parent directory may not be searched.
    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise UserError("this is a file", where=str(options.out), remedy="give a directory")
    return options


def _usable(device: str | None) -> str:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=chosen)
    # torch's errors for an unknown name, and for missing CUDA.
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"{chosen!r} cannot be used: {reason}", where="--device", remedy="use cpu or cuda") from error
    return chosen
