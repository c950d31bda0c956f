"""Score generators on fixed prompts from the same noise: a table by network evaluations, and a picture grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from tqdm import tqdm

from gdmd_lightning.callbacks.pictures import picture_grid
from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.data.test_prompts import read_test_prompts
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import resolve
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.metrics.evaluation import Generate, evaluate, shown
from gdmd_lightning.metrics.scores import GenEvalScore, Interval, RewardScore, TaskScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.clip import ContrastiveReward
from gdmd_lightning.rewards.shapes import ShapesReward

SCORER = "package:assets/shapes/scorer"


@dataclass(frozen=True)
class Contestant:
    """Something that makes pictures, and how many network evaluations one takes it."""

    name: str
    evaluations: int
    generate: Generate


@dataclass(frozen=True)
class Row:
    """A contestant's line: scores with intervals by ``<score>/<task>``, seconds a picture."""

    name: str
    evaluations: int
    seconds: float
    scores: dict[str, Interval] = field(default_factory=dict)


def teachers(module: DistillationModule, steps: int, guidance_scale: float) -> list[Contestant]:
    """The teacher as it is used, and in four steps with and without guidance."""

    def sampler(count: int, scale: float) -> Generate:
        return lambda noise, texts: module.generate_teacher(noise, texts, count, scale)

    few = module.sampler.steps
    return [
        Contestant(f"teacher, {steps} steps, guided", 2 * steps, sampler(steps, guidance_scale)),
        Contestant(f"teacher, {few} steps, guided", 2 * few, sampler(few, guidance_scale)),
        Contestant(f"teacher, {few} steps", few, sampler(few, 1.0)),
    ]


def student(name: str, module: DistillationModule) -> Contestant:
    """A module's averaged generator."""
    return Contestant(name, module.sampler.steps, module.generate)


def shapes_scores() -> list[TaskScore]:
    """GenEval's verdict, the graded reward, and the contrastive scorer in HPS's part."""
    hps = ContrastiveReward(SCORER, name="hps_like")
    return [GenEvalScore(), RewardScore(ShapesReward()), RewardScore(hps)]


def score(
    contestants: Sequence[Contestant],
    scores: Sequence[TaskScore],
    prompts: Sequence[Prompt],
    latent_shape: tuple[int, ...],
    seed: int = 0,
) -> list[Row]:
    """One row for each contestant, all from the same noise."""
    rows = []
    for contestant in tqdm(contestants, desc="scoring", unit="generator"):
        result = evaluate(contestant.generate, prompts, scores, latent_shape, seed=seed)
        found = {f"{s.name}/{task}": value for s in scores for task, value in s.intervals().items()}
        rows.append(Row(contestant.name, contestant.evaluations, result.seconds, found))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table: overall scores with 95% intervals, GenEval by task, milliseconds a picture."""
    names = list(rows[0].scores)
    wide = [name for name in names if name.endswith("/overall")]
    tasks = [name for name in names if name.startswith("geneval/") and name not in wide]
    header = ["generator", "NFE", *(n.removesuffix("/overall") for n in wide)]
    header += [n.removeprefix("geneval/") for n in tasks] + ["ms/picture"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.name, str(row.evaluations), *(str(row.scores[n]) for n in wide)]
        cells += [f"{row.scores[n].mean:.2f}" for n in tasks] + [f"{1000 * row.seconds:.1f}"]
        lines.append(cells)
    width = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, width, strict=True)) + " |" for line in lines)


@torch.no_grad()
def draw(
    contestants: Sequence[Contestant],
    prompts: Sequence[Prompt],
    latent_shape: tuple[int, ...],
    out: Path,
    columns: int = 9,
) -> None:
    """Save a picture grid: a row a contestant, a column a prompt and its noise."""
    texts, noise = shown(prompts, columns, latent_shape, 0)
    figure = picture_grid({c.name.replace(", ", "\n"): c.generate(noise, texts) for c in contestants}, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out)


def save(rows: Sequence[Row], path: Path) -> None:
    """The rows as JSON."""
    content = [
        {"name": r.name, "nfe": r.evaluations, "seconds": r.seconds, **{k: vars(v) for k, v in r.scores.items()}}
        for r in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> int:
    """``evaluate [--checkpoint NAME=PATH ...]``."""
    parser = ArgumentParser(prog="gdmd_lightning evaluate", description=__doc__, exit_on_error=False)
    parser.add_argument("--checkpoint", action="append", default=[], help="NAME=PATH of a run's .ckpt; may be repeated")
    parser.add_argument(
        "--teacher", type=str, default="package:assets/shapes", help="pipeline directory of the teacher"
    )
    parser.add_argument("--teacher_steps", type=int, default=30)
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--prompts", type=str, default="shapes")
    parser.add_argument("--count", type=int, default=600)
    parser.add_argument("--out", type=Path, default=Path("runs/evaluation"))
    options = parser.parse_args(arguments)
    modules: dict[str, DistillationModule] = {}
    for given in options.checkpoint:
        name, separator, path = given.partition("=")
        if not separator:
            raise UserError(f"{given!r} is not NAME=PATH", where="--checkpoint")
        modules[name] = load_module(path)
    any_module = next(iter(modules.values())) if modules else bare_teacher(resolve(options.teacher))
    prompts = read_test_prompts(options.prompts, options.count)
    contestants = teachers(any_module, options.teacher_steps, options.guidance_scale)
    contestants += [student(name, module) for name, module in modules.items()]
    rows = score(contestants, shapes_scores(), prompts, any_module.latent_shape)
    save(rows, options.out / "scores.json")
    draw(contestants, prompts, any_module.latent_shape, options.out / "pictures.png")
    print(table(rows))
    print(f"\nscores: {options.out / 'scores.json'}\npictures: {options.out / 'pictures.png'}")
    return 0


def bare_teacher(path: str) -> DistillationModule:
    """The embedded teacher alone, untrained students beside it."""
    from gdmd_lightning.families.sd3 import SD3Family
    from gdmd_lightning.methods.dmd import DMD

    module = DMD(SD3Family(path, max_sequence_length=0), height=32, width=32)
    module.configure_model()
    return module
