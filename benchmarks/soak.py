"""Many updates of GDMD on a tiny pipeline: fails if memory or the time of an update grows.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/soak.py [--updates 2000] [--memory 1.0] [--time 5.0]

Fits lines to the resident memory and the time of an update over the second half of the run, and prints the slopes with
95% intervals. Exits with status 1 if one grows: if its whole interval is above 0 and it grows by more than the limit.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from random_teachers import method, train, write_pipeline

BLOCKS = 20
"""The second half is fitted through means and medians of this many blocks, which are nearly independent."""


@dataclass(frozen=True)
class Slope:
    """A slope per 1,000 updates with its 95% interval."""

    value: float
    low: float
    high: float

    def grows(self, limit: float) -> bool:
        """Whether it is above 0 for certain, and above the limit."""
        return self.low > 0 and self.value > limit


def slope(values: Sequence[float], updates_apart: float) -> Slope:
    """Least squares through values that are ``updates_apart``; the interval is Student's."""
    from scipy.stats import linregress, t

    fitted = linregress([i * updates_apart / 1000 for i in range(len(values))], values)
    half = float(t.ppf(0.975, len(values) - 2) * fitted.stderr)
    return Slope(float(fitted.slope), float(fitted.slope) - half, float(fitted.slope) + half)


def in_blocks(values: Sequence[float]) -> list[float]:
    """The median of each of :data:`BLOCKS` equal parts."""
    size = len(values) // BLOCKS
    return [statistics.median(values[i * size : (i + 1) * size]) for i in range(BLOCKS)]


class Watch(pl.Callback):
    """Seconds and resident MiB of each update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mebibytes: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.mebibytes.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--memory", type=float, default=1.0, help="MiB per 1,000 updates that are no growth")
    parser.add_argument("--time", type=float, default=5.0, help="percent per 1,000 updates that are no growth")
    options = parser.parse_args()
    if options.updates < 4 * BLOCKS:
        parser.error(f"--updates must be at least {4 * BLOCKS}")
    watch = Watch()
    with tempfile.TemporaryDirectory() as directory:
        module = method("GDMD", write_pipeline(Path(directory), 1, 1), fake_score_updates=2)
        prompts = Path(directory) / "prompts.txt"  # few: embeddings of up to 4096 prompts stay in memory on purpose
        prompts.write_text("".join(f"picture {i}\n" for i in range(options.updates // 4)))
        train(module, options.updates, 4, 4, watch, source=str(prompts))
    half = options.updates // 2
    apart = half // BLOCKS
    usual = statistics.median(watch.seconds[half:])
    memory = slope(in_blocks(watch.mebibytes[half:]), apart)
    percent = slope([100 * seconds / usual for seconds in in_blocks(watch.seconds[half:])], apart)
    print(f"{options.updates} updates of GDMD, {1000 * usual:.1f} ms each; slopes over the second half, 95% intervals:")
    failed = False
    for name, found, limit, unit in (("memory", memory, options.memory, "MiB"), ("time", percent, options.time, "%")):
        grows = found.grows(limit)
        failed |= grows
        word = "FAIL" if grows else "pass"
        interval = f"[{found.low:+.2f}, {found.high:+.2f}]"
        print(f"{word}  {name}: {found.value:+.2f} {interval} {unit} per 1,000 updates, limit {limit:g}")
    print(
        f"resident memory: {watch.mebibytes[half]:.0f} MiB after {half} updates, {watch.mebibytes[-1]:.0f} at the end"
    )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
