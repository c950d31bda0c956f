"""Time of an update with ``model.speed.compile``, against the one without, in turn within one process, on the CPU.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/compiled.py [--method GDMD] [--rounds N] [--updates N] [--batch_size B]

Blocks are compiled by Inductor, torch's default, which needs a C++ compiler. The teacher is that of Shapes. In each
round all settings train anew; the time of a setting is the median over updates after the first two, which compile.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import lightning.pytorch as pl
from random_teachers import method, train

from gdmd_lightning.methods.settings import Speed

WARM_UP = 2


class Seconds(pl.Callback):
    """Seconds of each update."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.since = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(time.perf_counter() - self.since)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("DMD", "GDMD"), default="GDMD")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--updates", type=int, default=6)
    parser.add_argument("--batch_size", type=int, default=16, help="samples per update, in groups of 4")
    options = parser.parse_args()
    found: dict[str, list[float]] = {"none": [], "frozen": [], "blocks": []}
    compiling = {}
    for _ in range(options.rounds):
        for setting, medians in found.items():
            seconds = Seconds()
            module = method(options.method, "package:assets/shapes", speed=Speed(compile=setting))  # type: ignore[arg-type]
            train(module, options.updates + WARM_UP, options.batch_size, 4, seconds)
            medians.append(statistics.median(seconds.found[WARM_UP:]))
            compiling.setdefault(setting, sum(seconds.found[:WARM_UP]))
    for setting, medians in found.items():
        ratios = [own / none for own, none in zip(medians, found["none"], strict=True)]
        print(
            f"{setting}: {statistics.median(medians):.3f} s per update; ratio: median {statistics.median(ratios):.3f}, "
            f"from {min(ratios):.3f} to {max(ratios):.3f}; first {WARM_UP} updates {compiling[setting]:.0f} s"
        )


if __name__ == "__main__":
    main()
