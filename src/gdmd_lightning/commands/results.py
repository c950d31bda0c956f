"""Compare methods on Shapes over seeds; with one seed, every arm starts from the same DMD cold start."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from gdmd_lightning.files import make_directory
from gdmd_lightning.studies.arms import ARMS
from gdmd_lightning.studies.comparison import Comparison, named_arms
from gdmd_lightning.studies.tasks import SHAPES


def main(arguments: list[str]) -> int:
    """``results``; continues an interrupted comparison, or one with fewer updates."""
    parser = ArgumentParser(prog="gdmd_lightning results", description=__doc__, exit_on_error=False)
    parser.add_argument("--out", type=Path, default=Path("runs/results"), help="directory of runs and results")
    parser.add_argument(
        "--seeds", type=list[int], default=[0, 1, 2], help="processes with different seeds may share --out"
    )
    parser.add_argument("--arms", type=list[str], default=["DMD", "GDMD"], help=f"any of: {'; '.join(ARMS)}")
    parser.add_argument("--cold_start", type=int, default=100, help="DMD updates that all arms start from")
    parser.add_argument("--updates", type=int, default=350, help="updates of each arm after the cold start")
    parser.add_argument("--count", type=int, default=1200, help="test prompts")
    parser.add_argument("--fit", type=list[str], default=[], help="further arguments of all trainings")
    options = parser.parse_args(arguments)
    comparison = Comparison(
        task=SHAPES,
        out=options.out,
        seeds=tuple(options.seeds),
        arms=named_arms(options.arms),
        cold_start=options.cold_start,
        updates=options.updates,
        count=options.count,
        extra=tuple(options.fit),
    )
    comparison.check()
    make_directory(options.out)
    for line in comparison.train_and_score():
        print(line, flush=True)
    print(comparison.report())
    return 0
