"""The whole method on one CPU: a DMD cold start, then GDMD, a table of scores, pictures, and a pipeline."""

from __future__ import annotations

import time
from pathlib import Path

from jsonargparse import ArgumentParser

from gdmd_lightning.configuration.messages import parsed
from gdmd_lightning.configuration.numbers import check_options
from gdmd_lightning.directories import DirectoryLock, claim
from gdmd_lightning.ranges import Count

BATCH_SIZE = 48
"""Samples per update; the 64 of ``shapes.yaml`` would take more than ten minutes on two cores."""

# No evaluation while it trains: all generators are scored together at the end.
CHECKPOINTS = {
    "class_path": "ModelCheckpoint",
    "init_args": {"every_n_train_steps": 50, "save_last": True, "save_top_k": 0},
}
RECORD = {"class_path": "GradientRewardRecord", "init_args": {"pictures_every": 50}}

ENTRIES = ("dmd", "gdmd", "scores.json", "pictures.png", "pipeline")


def demo(out: Path, cold_start: int, updates: int, count: int, extra: list[str]) -> None:
    """Train DMD, then GDMD from it; score both and the teacher; export GDMD's generator; print the results.

    Args:
        out: Directory of everything written; what an earlier demo wrote there is replaced.
        cold_start: DMD updates.
        updates: GDMD updates after the cold start.
        count: Test prompts.
        extra: Further arguments of both trainings.

    Raises:
        UserError: If ``out`` has files that no demo wrote.
    """
    from gdmd_lightning.configuration.restore import load_module
    from gdmd_lightning.studies.arms import DMD, GDMD, last_checkpoint, option, train
    from gdmd_lightning.studies.contestants import draw, student, teachers
    from gdmd_lightning.studies.export import export, snippet
    from gdmd_lightning.studies.scorecards import score, write_scorecard
    from gdmd_lightning.studies.tables import score_table
    from gdmd_lightning.studies.tasks import SHAPES

    began = time.perf_counter()
    prompts = SHAPES.read_prompts(count)  # fails before training if the count is impossible
    claim(out, "demo", ENTRIES)
    dmd, gdmd = out / "dmd", out / "gdmd"
    print(f"1/3  DMD, {cold_start} updates: from the teacher to four steps")
    batch = option("data.batch_size", BATCH_SIZE)
    callbacks = option("trainer.callbacks", [CHECKPOINTS])
    train(dmd, [*DMD.arguments, batch, callbacks, option("trainer.max_steps", cold_start), *extra])
    print(f"2/3  GDMD, {updates} updates: a reward weighs each distillation gradient by where it leads")
    start = option("model.start_from", str(last_checkpoint(dmd)))
    callbacks = option("trainer.callbacks", [CHECKPOINTS, RECORD])
    train(gdmd, [*GDMD.arguments, batch, callbacks, option("trainer.max_steps", updates), start, *extra])
    print(f"3/3  scores on {count} test prompts")
    modules = {
        "DMD": load_module(str(last_checkpoint(dmd)), role="ema"),
        "GDMD": load_module(str(last_checkpoint(gdmd)), role="ema"),
    }
    contestants = [*teachers(modules["GDMD"]), *(student(name, each) for name, each in modules.items())]
    card = score(contestants, SHAPES, count)
    write_scorecard(card, out / "scores.json")
    draw(contestants, prompts, out / "pictures.png")
    pipeline = export(modules["GDMD"], out / "pipeline")
    print(f"\n{score_table(card.rows)}\n")
    print(f"pictures:       {out / 'pictures.png'}")
    print(f"checkpoint:     {last_checkpoint(gdmd)}")
    print(f"record:         {gdmd / 'gradient_rewards'}  (open notebooks/gradient_rewards.ipynb)")
    print(f"pipeline:       {pipeline}\n\nimport diffusers\n{snippet(modules['GDMD'], pipeline)}\n")
    print(f"total: {(time.perf_counter() - began) / 60:.1f} minutes")


def main(arguments: list[str]) -> int:
    """``demo [--cold_start 60 --updates 100 ...]``."""
    parser = ArgumentParser(prog="gdmd_lightning demo", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/demo"), help="directory to write; an earlier demo there is replaced"
    )
    parser.add_argument("--cold_start", type=int, default=60, help="DMD updates")
    parser.add_argument("--updates", type=int, default=100, help="GDMD updates")
    parser.add_argument("--count", type=int, default=480, help="test prompts")
    parser.add_argument("--fit", type=list[str], default=[], help="further arguments of both trainings")
    options = parsed(parser, arguments)
    check_options(options, cold_start=Count, updates=Count, count=Count)
    lock = DirectoryLock(options.out)
    try:
        demo(options.out, options.cold_start, options.updates, options.count, options.fit)
    finally:
        lock.release()
    return 0
