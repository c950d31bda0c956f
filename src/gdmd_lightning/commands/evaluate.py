"""Score generators on fixed prompts from the same noise; write a table and a picture grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser, Namespace

from gdmd_lightning.configuration.devices import DEVICE_HELP, usable_device
from gdmd_lightning.configuration.loading import add_loading_options
from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import output_directory
from gdmd_lightning.ranges import Count, NonNegative, Steps

if TYPE_CHECKING:
    from gdmd_lightning.methods.base import DistillationModule
    from gdmd_lightning.studies.tasks import Task


def main(arguments: list[str]) -> int:
    """``evaluate [--checkpoint NAME=PATH ...]``."""
    parser = ArgumentParser(
        prog="gdmd_lightning evaluate", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=PATH of a .ckpt; may be repeated")
    add_loading_options(parser)
    parser.add_argument("--teacher_steps", type=int, default=30, help="steps of the guided teacher")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="guidance scale of the teacher")
    parser.add_argument("--prompts", type=str, default="shapes", help="shapes, or a prompt file")
    parser.add_argument("--count", type=int, default=600, help="number of prompts")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="directory of scores and pictures")
    options = parsed(parser, arguments)
    check_options(options, teacher_steps=Steps, guidance_scale=NonNegative, count=Count)

    from gdmd_lightning.studies.contestants import bare_teacher, draw, student, teachers
    from gdmd_lightning.studies.scorecards import score, write_scorecard
    from gdmd_lightning.studies.tables import score_table
    from gdmd_lightning.studies.tasks import SHAPES

    task = replace(SHAPES, prompts=options.prompts)
    task.check(options.count)
    with output_directory(options.out):
        device = usable_device(options.device)
        modules = _load(options, task, device)
        module = next(iter(modules.values())) if modules else bare_teacher(task, options.teacher, device)
        contestants = teachers(module, options.teacher_steps, options.guidance_scale)
        contestants += [student(name, each) for name, each in modules.items()]
        card = score(contestants, task, options.count, device=device)
        write_scorecard(card, options.out / "scores.json")
        draw(contestants, task.read_prompts(options.count), options.out / "pictures.png")
    print(score_table(card.rows))
    print(f"\nscores: {options.out / 'scores.json'}\npictures: {options.out / 'pictures.png'}")
    return 0


def _load(options: Namespace, task: Task, device: str) -> dict[str, DistillationModule]:
    from gdmd_lightning.configuration.restore import load_module, picture_size

    named = []
    for given in options.checkpoint:
        name, separator, path = given.partition("=")
        if not separator:
            raise UserError(f"{given!r} is not NAME=PATH", where="--checkpoint", remedy="give a name, then the path")
        task.check_size(path, *picture_size(path))
        named.append((name, path))
    loading = {"role": "ema", "teacher": options.teacher, "trust": options.trust}
    return {name: load_module(path, device, **loading) for name, path in named}
