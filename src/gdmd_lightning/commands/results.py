"""Compare methods on Shapes over seeds: every arm starts from the same seed's DMD cold start."""

from __future__ import annotations

import json
import time
from pathlib import Path

from jsonargparse import ArgumentParser

from gdmd_lightning.commands.demo import train
from gdmd_lightning.commands.evaluate import score, shapes_scores, student, teachers
from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.data.test_prompts import read_test_prompts
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import read_checkpoint

GDMD = ("--config", "shapes.yaml")
DMD = ("--config", "shapes.yaml", "--config", "shapes_dmd.yaml")
ARMS: dict[str, tuple[str, ...]] = {
    "DMD": DMD,
    "GDMD": GDMD,
    "GDMD, lambda 0": (*GDMD, "--model.lambda_policy=0"),
    "GDMD, lambda 5": (*GDMD, "--model.lambda_policy=5"),
    "GDMD, lambda 10": (*GDMD, "--model.lambda_policy=10"),
    "GDMD, levels not centred": (*GDMD, "--model.verdict.centre_levels=false"),
    "GDMD, lambda 10, levels not centred": (
        *GDMD,
        "--model.lambda_policy=10",
        "--model.verdict.centre_levels=false",
    ),
    "GDMD, one target": (*GDMD, "--model.targets.size=1"),
    "GDMD, four targets": (*GDMD, "--model.targets.size=4"),
    "GDMD, weighted": (*GDMD, "--model.policy.form=weighted"),
    "GDMD, policies at the state": (*GDMD, "--model.policy.at=state"),
    "GDMD, groups of a state": (*GDMD, "--model.verdict.compare=state"),
    "GDMD, against the sample": (*GDMD, "--model.verdict.compare=sample"),
    "GDMD, groups over snapshots": (*GDMD, "--model.targets.over=snapshot"),
    "GDMD, groups over both": (*GDMD, "--model.targets.over=both"),
}
COLD_START = "cold start"
ANOTHER = "use another --out"
# Nothing that watches a training, so that its seconds and evaluations are the method's own. Without the counter a run
# that goes on overwrites its last.ckpt even where --out is spelt otherwise than before; with it, a last-v1.ckpt would
# lie beside the one that is scored.
LAST = json.dumps(
    [
        {
            "class_path": "ModelCheckpoint",
            "init_args": {"save_last": True, "save_top_k": 0, "enable_version_counter": False},
        }
    ]
)
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=50", f"--trainer.callbacks={LAST}")


def run_arm(out: Path, name: str, updates: int, seed: int, start: Path | None, count: int, more: list[str]) -> None:
    """Train and score one arm of one seed into ``out``; goes on from what lies there, if anything."""
    if scored(out, updates).is_file():
        return
    before = int(read_checkpoint(str(_last(out)), in_memory=False)["global_step"]) if _last(out).is_file() else 0
    if before > updates:
        raise UserError(f"{_last(out)} is {before} updates old, not {updates}", where="results", remedy=ANOTHER)
    cost = out / f"cost_{updates}.json"
    if not cost.is_file():
        _write(cost, _train(out, name, updates, before, seed, start, more))
    module = load_module(str(_last(out)))
    _write(scored(out, updates), {**_scores(module, name, count), **json.loads(cost.read_text(encoding="utf-8"))})


def _train(
    out: Path, name: str, updates: int, before: int, seed: int, start: Path | None, more: list[str]
) -> dict[str, float]:
    """Train on from ``before`` to ``updates``; network evaluations and seconds an update."""
    arguments = [*ARMS[name], f"--trainer.max_steps={updates}", f"--model.seed={seed}", f"--data.seed={seed}"]
    if start is not None:
        arguments.append(f"--model.start_from={start}")
    if before:
        arguments.append(f"--ckpt_path={_last(out)}")
    began = time.perf_counter()
    _, cli = train(out, *arguments, f"--seed_everything={seed}", *QUIET, *more)
    seconds = time.perf_counter() - began
    done = max(updates - before, 1)
    return {"evaluations": sum(cli.model.networks.evaluations.values()) / done, "seconds": seconds / done}


def _last(out: Path) -> Path:
    return out / "checkpoints" / "last.ckpt"


def scored(out: Path, updates: int) -> Path:
    """Where an arm's scores after so many updates lie."""
    return out / f"scores_{updates}.json"


def _scores(module: DistillationModule, name: str, count: int) -> dict[str, float]:
    prompts = read_test_prompts("shapes", count)
    (row,) = score([student(name, module)], shapes_scores(), prompts, module.latent_shape)
    return {key: value.mean for key, value in row.scores.items()}


def _write(path: Path, content: object) -> None:
    fresh = path.with_suffix(".tmp")
    fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    fresh.rename(path)


def teacher_scores(out: Path, module: DistillationModule, count: int) -> dict[str, dict[str, float]]:
    """The teacher's rows, computed once."""
    path = out / "teacher.json"
    if not path.is_file():
        contestants = teachers(module, 30, module.matching.guidance_scale)
        rows = score(contestants, shapes_scores(), read_test_prompts("shapes", count), module.latent_shape)
        _write(path, {row.name: {key: value.mean for key, value in row.scores.items()} for row in rows})
    loaded: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def summary(values: list[float]) -> str:
    """Mean over seeds with a 95% t interval."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:.3f} ± {half:.3f}"


def report(
    out: Path, seeds: list[int], arms: list[str], cold_start: int, updates: int, teacher: dict[str, dict[str, float]]
) -> str:
    """A Markdown table: overall scores over seeds, and each graded reward against the teacher's and against DMD's.

    The teacher's is that of its first row; DMD's is that of the same seed.
    """

    def read(arm: str, after: int) -> list[dict[str, float]]:
        return [json.loads(scored(_place(out, arm, seed), after).read_text()) for seed in seeds]

    start = f"cold start: DMD, {cold_start} updates"
    runs = {start: read(COLD_START, cold_start), **{arm: read(arm, updates) for arm in arms}}
    control = [run["shapes/overall"] for run in runs["DMD"]] if "DMD" in arms else None
    best = next(iter(teacher.values()))["shapes/overall"]
    names = ["geneval/overall", "shapes/overall", "hps_like/overall"]
    lines = [
        "| generator | GenEval | graded reward | HPS-like | graded, minus the teacher's | graded, minus DMD's "
        "| evaluations/update | s/update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, scores in teacher.items():
        lines.append(f"| {name} | " + " | ".join(f"{scores[key]:.3f}" for key in names) + " | | | | |")
    for arm, results in runs.items():
        cells = [summary([run[key] for run in results]) for key in names]
        graded = [run["shapes/overall"] for run in results]
        cells.append(summary([mine - best for mine in graded]))
        paired = control is not None and arm not in ("DMD", start)
        cells.append(summary([a - b for a, b in zip(graded, control or [], strict=True)]) if paired else "")
        cells += [
            f"{sum(run[key] for run in results) / len(results):.{digits}f}"
            for key, digits in (("evaluations", 0), ("seconds", 2))
        ]
        lines.append(f"| {arm}, 4 steps | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _place(out: Path, arm: str, seed: int) -> Path:
    slug = "".join(c if c.isalnum() else "_" for c in arm.lower())
    return out / f"seed{seed}" / slug


def main(arguments: list[str]) -> int:
    """``results``; goes on where an earlier call was cut off, or ended with fewer updates."""
    parser = ArgumentParser(prog="gdmd_lightning results", description=__doc__, exit_on_error=False)
    parser.add_argument("--out", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=list[int], default=[0, 1, 2], help="processes may share --out, a seed each")
    parser.add_argument("--arms", type=list[str], default=["DMD", "GDMD"], help=f"of: {'; '.join(ARMS)}")
    parser.add_argument("--cold_start", type=int, default=100, help="DMD updates that all arms start from")
    parser.add_argument("--updates", type=int, default=350, help="updates of each arm after it")
    parser.add_argument("--count", type=int, default=1200, help="test prompts")
    parser.add_argument("--fit", type=list[str], default=[], help="further arguments of all trainings")
    options = parser.parse_args(arguments)
    unknown = [arm for arm in options.arms if arm not in ARMS]
    if unknown:
        raise UserError(f"unknown arm {unknown[0]!r}", where="--arms", remedy=f"use: {'; '.join(ARMS)}")
    out, count = options.out, options.count
    read_test_prompts("shapes", count)  # a count that makes no sense is told before any training
    for seed in options.seeds:
        cold = _place(out, COLD_START, seed)
        if any(path != scored(cold, options.cold_start) for path in cold.glob("scores_*.json")):
            raise UserError(f"arms in {out} start from another cold start", where="--cold_start", remedy=ANOTHER)
        run_arm(cold, "DMD", options.cold_start, seed, None, count, options.fit)
        for arm in options.arms:
            run_arm(_place(out, arm, seed), arm, options.updates, seed + 1000, _last(cold), count, options.fit)
            print(f"seed {seed}, {arm}: done", flush=True)
    first = load_module(str(_last(_place(out, COLD_START, options.seeds[0]))))
    text = report(
        out, options.seeds, options.arms, options.cold_start, options.updates, teacher_scores(out, first, count)
    )
    (out / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0
