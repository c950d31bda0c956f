"""The whole idea on one CPU: DMD as the cold start, GDMD from there, a table, pictures, a pipeline to take home."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from gdmd_lightning.commands import fit
from gdmd_lightning.commands.evaluate import draw, save, score, shapes_scores, student, table, teachers
from gdmd_lightning.commands.export import export, snippet
from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.data.test_prompts import read_test_prompts


def train(out: Path, *arguments: str) -> tuple[Path, Any]:
    """Run ``fit`` with its logs in ``out``; returns the last checkpoint and the finished command line.

    Raises:
        KeyboardInterrupt: If a signal ended the run early.
    """
    where = [f"--trainer.logger.init_args.{key}={value}" for key, value in _logger(out).items()]
    cli = fit.run([*arguments, *where])
    if fit.signal_received(cli):
        raise KeyboardInterrupt
    return out / "checkpoints" / "last.ckpt", cli


def _logger(out: Path) -> dict[str, str]:
    return {"save_dir": str(out.parent), "name": out.name, "version": "."}


def demo(out: Path, cold_start: int, updates: int, count: int, more: list[str]) -> None:
    """Train both, score them beside the teacher, export the last and print what was found.

    Args:
        out: Directory of everything written; an earlier demo's is replaced.
        cold_start: DMD updates.
        updates: GDMD updates after them.
        count: Test prompts.
        more: Further arguments of both trainings.
    """
    began = time.perf_counter()
    prompts = read_test_prompts("shapes", count)
    shutil.rmtree(out, ignore_errors=True)
    print(f"1/3  DMD, {cold_start} updates: from the teacher to four steps")
    dmd, _ = train(
        out / "dmd",
        "--config",
        "shapes.yaml",
        "--config",
        "shapes_dmd.yaml",
        f"--trainer.max_steps={cold_start}",
        *more,
    )
    print(f"2/3  GDMD, {updates} updates: the reward weighs where each distillation gradient leads")
    gdmd, _ = train(
        out / "gdmd", "--config", "shapes.yaml", f"--trainer.max_steps={updates}", f"--model.start_from={dmd}", *more
    )
    print(f"3/3  scores on {count} test prompts")
    modules = {"DMD": load_module(str(dmd)), "GDMD": load_module(str(gdmd))}
    module = modules["GDMD"]
    contestants = teachers(module, 30, module.matching.guidance_scale)
    contestants += [student(name, each) for name, each in modules.items()]
    rows = score(contestants, shapes_scores(), prompts, module.latent_shape)
    save(rows, out / "scores.json")
    draw(contestants, prompts, module.latent_shape, out / "pictures.png")
    pipeline = export(module, out / "pipeline")
    print(f"\n{table(rows)}\n")
    print(f"pictures:       {out / 'pictures.png'}")
    print(f"checkpoint:     {gdmd}")
    print(f"record:         {out / 'gdmd' / 'gradient_rewards'}  (open notebooks/gradient_rewards.ipynb)")
    print(f"pipeline:       {pipeline}\n\nimport diffusers\n{snippet(module, pipeline)}\n")
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes in all")


def main(arguments: list[str]) -> int:
    """``demo``; what it does not know goes to both trainings."""
    parser = ArgumentParser(prog="gdmd_lightning demo", description=__doc__, exit_on_error=False)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--cold_start", type=int, default=60, help="DMD updates")
    parser.add_argument("--updates", type=int, default=100, help="GDMD updates")
    parser.add_argument("--count", type=int, default=600, help="test prompts")
    parser.add_argument("--fit", type=list[str], default=[], help="further arguments of both trainings")
    options = parser.parse_args(arguments)
    try:
        demo(options.out, options.cold_start, options.updates, options.count, options.fit)
    except KeyboardInterrupt:
        print("stopped by a signal")
        return 130
    return 0
