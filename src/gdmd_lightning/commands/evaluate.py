"""Score generators on fixed prompts from the same noise, or directories of pictures; write a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

from gdmd_lightning.configuration.devices import DEVICE_HELP, usable_device
from gdmd_lightning.configuration.loading import add_loading_options
from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.configuration.prompt_options import add_prompt_options
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import output_directory
from gdmd_lightning.ranges import Count, NonNegative, Seed, Steps

if TYPE_CHECKING:
    from gdmd_lightning.methods.base import DistillationModule
    from gdmd_lightning.prompts import Prompt
    from gdmd_lightning.studies.tasks import Task


def main(arguments: list[str]) -> int:
    """``evaluate [--checkpoint NAME=PATH ...]``, or with ``--scores``, ``--pictures`` or ``--pipeline``: any scores."""
    parser = ArgumentParser(
        prog="gdmd_lightning evaluate", description=__doc__, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=PATH of a .ckpt; may be repeated")
    parser.add_argument("--pictures", action="append", default=[], help="NAME=DIR of pictures; may be repeated")
    parser.add_argument(
        "--pipeline", action="append", default=[], help="NAME=PATH of a diffusers pipeline, or hub id; may be repeated"
    )
    parser.add_argument("--config", action="config", help="YAML file with these options, such as scores")
    parser.add_argument(
        "--scores", type=list[dict], default=[], help="to compute; default: those of Shapes, next to its teacher's"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="pictures scored, or drawn by a checkpoint, at once")
    parser.add_argument("--steps", type=int, default=30, help="steps of pipelines")
    parser.add_argument("--pipeline_guidance", type=float, default=4.5, help="guidance scale of pipelines")
    parser.add_argument("--height", type=int | None, default=None, help="height of pipelines' pictures, in pixels")
    parser.add_argument("--width", type=int | None, default=None, help="width of pipelines' pictures, in pixels")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="of pipelines"
    )
    parser.add_argument(
        "--pipeline_arguments",
        type=dict[str, Any],
        default={},
        help="further arguments of pipelines' calls, such as '{\"max_sequence_length\": 0}'",
    )
    parser.add_argument("--per_prompt", type=int, default=1, help="pictures of a prompt that are drawn and kept")
    parser.add_argument("--seed", type=int, default=0, help="seed of their noise")
    add_loading_options(parser)
    parser.add_argument("--teacher_steps", type=int, default=30, help="steps of the guided teacher")
    parser.add_argument("--guidance_scale", type=float, default=3.0, help="guidance scale of the teacher")
    parser.add_argument("--prompts", type=str, default="shapes", help="shapes, or a prompt file")
    add_prompt_options(parser)
    parser.add_argument("--count", type=int, default=600, help="number of prompts")
    parser.add_argument("--device", type=str, default="auto", help=DEVICE_HELP)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"), help="directory of scores and pictures")
    options = parsed(parser, arguments)
    check_options(options, teacher_steps=Steps, guidance_scale=NonNegative, count=Count, batch_size=Count)
    check_options(options, steps=Steps, pipeline_guidance=NonNegative, height=Count, width=Count)
    check_options(options, per_prompt=Count, seed=Seed)
    _refuse_unused(options, parser.get_defaults())
    return _score_pictures(options) if _keeps_pictures(options) else _score_generators(options)


OF_PIPELINES = ("steps", "pipeline_guidance", "height", "width", "dtype", "pipeline_arguments")
OF_CHECKPOINTS = ("teacher", "trust")
OF_PROMPTS = ("prompts", "count", "column", "split", "tag")
OF_DRAWINGS = ("per_prompt", "seed")
OF_TEACHERS = ("teacher_steps", "guidance_scale")


def _keeps_pictures(options: Namespace) -> bool:
    """Whether pictures are files that are scored, and not those of Shapes' teacher and of checkpoints next to it."""
    return bool(options.pictures or options.pipeline or options.scores)


def _refuse_unused(options: Namespace, defaults: Namespace) -> None:
    """Fail if an option would be ignored."""
    files = _keeps_pictures(options)
    drawn = bool(options.pipeline or options.checkpoint)
    unused = {
        "with --pipeline": () if options.pipeline else OF_PIPELINES,
        "with --pipeline or --checkpoint": OF_PROMPTS if files and not drawn else (),
        "with --checkpoint": OF_CHECKPOINTS if files and not options.checkpoint else (),
        "with --pipeline, or with --checkpoint and --scores": () if files and drawn else OF_DRAWINGS,
        "with --scores, --pictures or --pipeline": () if files else ("batch_size",),
        "for Shapes' teacher, without --scores, --pictures and --pipeline": OF_TEACHERS if files else (),
    }
    for when, names in unused.items():
        for name in names:
            if options[name] != defaults[name]:
                raise UserError(f"only {when}", where=f"--{name}", remedy="leave it out")
    if files and not (drawn or options.pictures):
        remedy = "give --pictures, --pipeline or --checkpoint"
        raise UserError("there is nothing to score", where="--scores", remedy=remedy)


def _score_generators(options: Namespace) -> int:
    from gdmd_lightning.studies.contestants import bare_teacher, draw, student, teachers
    from gdmd_lightning.studies.scorecards import score, write_scorecard
    from gdmd_lightning.studies.tables import score_table
    from gdmd_lightning.studies.tasks import SHAPES

    where = {name: options[name] for name in ("prompts", "column", "split", "tag")}
    task = replace(SHAPES, **where)
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


def _score_pictures(options: Namespace) -> int:
    """Score directories, and what checkpoints and pipelines draw into directories of OUT."""
    pictures, pipelines, checkpoints = (
        [_named(given, f"--{kind}") for given in options[kind]] for kind in ("pictures", "pipeline", "checkpoint")
    )
    named = [name for name, _ in [*pictures, *pipelines, *checkpoints]]
    if len(set(named)) < len(named):
        raise UserError("a name is given twice", where="--pictures", remedy="give each row of the table its own name")
    from gdmd_lightning.data.evaluation_prompts import read_evaluation_prompts
    from gdmd_lightning.studies.folders import read_folder, score_folder
    from gdmd_lightning.studies.pipelines import Drawing, checked_arguments, draw_pictures
    from gdmd_lightning.studies.scorecards import write_scores
    from gdmd_lightning.studies.tables import folder_table
    from gdmd_lightning.studies.tasks import built_scores, shapes_scores

    how = {"height": options.height, "width": options.width, "dtype": options.dtype, "seed": options.seed}
    drawings = {}
    for name, path in pipelines:
        arguments = checked_arguments(path, options.pipeline_arguments, options.steps)
        drawings[name] = Drawing(path, options.steps, options.pipeline_guidance, arguments=arguments, **how)
    shots = {name: read_folder(Path(directory)) for name, directory in pictures}
    columns = {name: options[name] for name in ("column", "split", "tag")}
    prompts = read_evaluation_prompts(options.prompts, options.count, **columns) if pipelines or checkpoints else []
    scores = built_scores(options.scores) if options.scores else shapes_scores()
    settings = {score.name: score.settings() for score in scores}
    for score in scores:
        for asked in [*([shot.prompt for shot in each] for each in shots.values()), prompts]:
            score.check(asked)
        score.prepare()
    device = usable_device(options.device)
    draw = [_drawing_of_checkpoint(options, name, path, prompts, device) for name, path in checkpoints]
    rows = []
    with output_directory(options.out):
        for name, drawing in drawings.items():
            draw_pictures(drawing, prompts, options.per_prompt, options.out / name, device)
        for drawn in draw:
            drawn()
        shots |= {name: read_folder(options.out / name) for name, _ in [*pipelines, *checkpoints]}
        for name, each in shots.items():
            record = options.out / f"{name}.jsonl"
            rows.append(score_folder(name, each, scores, record, settings, device, options.batch_size))
        write_scores(rows, options.out / "scores.json")
    print(folder_table(rows))
    print(f"\nscores: {options.out / 'scores.json'}\neach picture: {options.out}/NAME.jsonl")
    return 0


def _drawing_of_checkpoint(
    options: Namespace, name: str, path: str, prompts: Sequence[Prompt], device: str
) -> Callable[[], object]:
    """What makes the pictures that OUT/NAME lacks, as ``sample`` does, after a check of those that are there."""
    from gdmd_lightning.configuration.restore import load_module
    from gdmd_lightning.studies.sampling import Origin, Picture, complete, existing_pictures, open_checkpoint

    digest, size = open_checkpoint(path)
    origin, out = Origin(options.seed, Path(path).name, digest, *size), options.out / name
    wanted = [Picture(row, n, prompt) for row, prompt in enumerate(prompts) for n in range(options.per_prompt)]
    existing = existing_pictures(out, wanted, origin)
    load = partial(load_module, path, device, role="ema", teacher=options.teacher, trust=options.trust)

    def draw() -> None:
        out.mkdir(exist_ok=True)
        complete(out, wanted, existing, origin, load, options.batch_size)

    return draw


def _named(given: str, option: str) -> tuple[str, str]:
    name, separator, path = given.partition("=")
    if not separator or name in ("", ".", "..") or "/" in name:
        raise UserError(f"{given!r} is not NAME=PATH", where=option, remedy="give a name, then the path")
    return name, path


def _load(options: Namespace, task: Task, device: str) -> dict[str, DistillationModule]:
    from gdmd_lightning.configuration.restore import load_module, picture_size

    named = []
    for given in options.checkpoint:
        name, path = _named(given, "--checkpoint")
        task.check_size(path, *picture_size(path))
        named.append((name, path))
    loading = {"role": "ema", "teacher": options.teacher, "trust": options.trust}
    return {name: load_module(path, device, **loading) for name, path in named}
