"""Sample a checkpoint: prompts in, pictures out.

``OUT/000000-0.png`` is the first picture of the first prompt. Run the same command again to complete a directory:
a picture depends on its prompt's row, its number, the seed, its size and the checkpoint only.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from gdmd_lightning.configuration.devices import DEVICE_HELP, usable_device
from gdmd_lightning.configuration.loading import add_loading_options
from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.configuration.prompt_options import add_prompt_options
from gdmd_lightning.data.files import FORMATS
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import output_directory
from gdmd_lightning.ranges import Count, NonNegative, Seed, Whole

if TYPE_CHECKING:
    from gdmd_lightning.methods.base import DistillationModule


def main(arguments: list[str]) -> int:
    """``sample CHECKPOINT PROMPTS OUT``."""
    options = _parse(arguments)
    from gdmd_lightning.configuration.restore import load_module
    from gdmd_lightning.studies.sampling import Origin, complete, existing_pictures, open_checkpoint, wanted_pictures

    out, device = options.out, usable_device(options.device)
    digest, trained = open_checkpoint(options.checkpoint)
    height, width = options.height or trained[0], options.width or trained[1]
    name = Path(options.checkpoint).name
    origin = Origin(options.seed, name, digest, height, width, options.teacher_steps, options.guidance_scale)
    columns = options.column, options.split
    wanted = wanted_pictures(options.prompts, *columns, options.count, options.per_prompt, options.tag)
    existing = existing_pictures(out, wanted, origin)
    loading = {"role": "ema", "teacher": options.teacher, "trust": options.trust}

    def load() -> DistillationModule:
        return load_module(options.checkpoint, device, size=(height, width), **loading)

    with output_directory(out):
        seconds = complete(out, wanted, existing, origin, load, options.batch_size)
    print(f"pictures: {out} ({existing.missing} made, {existing.wanted - existing.missing} existed)")
    print(f"seconds per picture: {seconds:.3f}" if existing.missing else "all pictures existed")
    return 0


def _parse(arguments: list[str]) -> Namespace:
    about = f"{__doc__}\nA pipeline directory written by export needs no command: sample it with diffusers."
    parser = ArgumentParser(prog="gdmd_lightning sample", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="a .ckpt written by fit")
    kinds = f"a {FORMATS} file, a folder of them, a Hugging Face data set, or shapes"
    parser.add_argument("prompts", type=str, help=kinds)
    parser.add_argument("out", type=Path, help="directory of the pictures; existing ones are kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--height", type=int | None, default=None, help="height in pixels; default: as trained")
    parser.add_argument("--width", type=int | None, default=None, help="width in pixels; default: as trained")
    parser.add_argument("--batch_size", type=int, default=8, help="pictures made at once")
    parser.add_argument("--per_prompt", type=int, default=1, help="pictures per prompt")
    parser.add_argument("--count", type=int | None, default=None, help="use only the first COUNT prompts")
    add_prompt_options(parser)
    parser.add_argument("--teacher_steps", type=int, default=0, help="sample the teacher instead, in this many steps")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="guidance scale of the teacher")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)
    add_loading_options(parser)
    options = parsed(parser, arguments)
    check_options(options, batch_size=Count, per_prompt=Count, count=Count, seed=Seed, height=Count, width=Count)
    check_options(options, teacher_steps=Whole, guidance_scale=NonNegative)
    if not options.teacher_steps and options.guidance_scale != parser.get_defaults().guidance_scale:
        raise UserError(
            "only for the teacher", where="--guidance_scale", remedy="give --teacher_steps, or leave it out"
        )
    # os.path, unlike Path, raises no error if a parent directory may not be searched.
    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise UserError("this is a file", where=str(options.out), remedy="give a directory")
    return options
