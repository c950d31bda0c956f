"""Time, memory and FLOPs of the parts of an update of DMD and GDMD, as a Markdown table; one thread, on the CPU.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/update_parts.py [--teachers shapes mid] [--batch_size B] [--updates N]

``shapes`` is the embedded teacher, ``mid`` an SD3 of 115 million parameters with random weights. Seconds are medians
over updates. Memory is the most bytes of tensors alive during a part, weights and optimizer states included. FLOPs are
those that ``torch.utils.flop_counter`` knows: matrix products and convolutions.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from random_teachers import method, train, write_pipeline
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gdmd_lightning.phases import listening, phase
from gdmd_lightning.planning.trace import Trace, Watch

PARTS = {
    "rollout": "rollout",
    "generator forward": "generator",
    "teacher": "teacher",
    "targets": "fake score, targets",
    "fake_score forward": "fake score, training",
    "old": "old policy",
    "decoding": "decoding",
    "reward": "reward",
    "generator backward": "backward, generator",
    "fake_score backward": "backward, fake score",
    "optimizer step": "optimizer",
    "rest": "rest: data, noise, averages",
}
"""Phases that the code announces, and networks within them, by what the table calls them."""
WARM_UP = 2


class Split:
    """A listener of phases that divides a quantity among the innermost ones.

    Args:
        turn: Called with the name of the part that ends; what it returns is added to that part.
    """

    def __init__(self, turn: Callable[[str], float]) -> None:
        self.turn, self.parts, self._open = turn, dict.fromkeys(PARTS, 0.0), ["rest"]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._end()
        self._open.append(name if name in PARTS else self._open[-1])
        try:
            yield
        finally:
            self._end()
            self._open.pop()

    def _end(self) -> None:
        self.parts[self._open[-1]] += self.turn(self._open[-1])

    def finish(self) -> dict[str, float]:
        """What each part has since the last call."""
        self._end()
        found, self.parts = self.parts, dict.fromkeys(PARTS, 0.0)
        return found


def difference(read: Callable[[], float]) -> Callable[[str], float]:
    """By how much a reading grew since the last call."""
    before = read()

    def turn(_: str) -> float:
        nonlocal before
        now = read()
        grown, before = now - before, now
        return grown

    return turn


class Peaks:
    """Most bytes alive in each part, from a trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.parts = trace, dict.fromkeys(PARTS, 0)
        self._begin()

    def _begin(self) -> None:
        self._watching = ExitStack()
        self._watch: Watch = self._watching.enter_context(self.trace.watch())

    def __call__(self, name: str) -> float:
        self._watching.close()
        self.parts[name] = max(self.parts[name], self._watch.peak)
        self._begin()
        return 0.0


class Measured(pl.Callback):
    """Seconds of all updates but the last, whose FLOPs and memory are counted instead, after the warm-up."""

    def __init__(self, updates: int) -> None:
        self.last = updates + WARM_UP
        self.seconds: list[dict[str, float]] = []
        self.flops: dict[str, float] = {}
        self.bytes: dict[str, int] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        velocity = module.roles.velocity

        def announced(role: str, *arguments: Any, **options: Any) -> Any:
            with phase(role):  # "teacher" and "old" are parts; the others belong to the part that they are in
                return velocity(role, *arguments, **options)

        module.roles.velocity = announced

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        self._inside = ExitStack()
        if module.updates < self.last:
            self._split = Split(difference(time.perf_counter))
        else:
            self._inside.enter_context(sdpa_kernel(SDPBackend.MATH))  # the counter does not know the CPU's fused one
            trace, flops = Trace("cpu"), FlopCounterMode(display=False)
            trace.hold(module)
            trace.see(t for o in trainer.optimizers for state in o.state.values() for t in state.values())
            for part in module.family.loaded.components.values():
                if hasattr(part, "parameters"):
                    trace.hold(part)
            self._inside.enter_context(flops)
            self._inside.enter_context(trace)
            self._split, self._peaks = Split(difference(flops.get_total_flops)), Split(Peaks(trace))
            self._inside.enter_context(listening(self._peaks))
        self._inside.enter_context(listening(self._split))

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        found = self._split.finish()
        if module.updates <= self.last:
            self.seconds.append(found)
        else:
            self.flops = found
            self._peaks.finish()
            self.bytes = self._peaks.turn.parts  # type: ignore[attr-defined]
        self._inside.close()


def rows(measured: Measured) -> Iterator[str]:
    """A line of the table for each part that the method has."""
    seconds = measured.seconds[WARM_UP:]
    total = statistics.median(sum(update.values()) for update in seconds)
    for part, title in PARTS.items():
        time_of = statistics.median(update[part] for update in seconds)
        if any(update[part] for update in seconds):
            share, flops, peak = time_of / total, measured.flops[part], measured.bytes[part]
            yield f"| {title} | {1000 * time_of:.1f} | {share:.0%} | {flops / 1e9:.2f} | {peak / 2**20:.0f} |"
    flops, peak = sum(measured.flops.values()), max(measured.bytes.values())
    yield f"| **update** | {1000 * total:.1f} | 100% | {flops / 1e9:.2f} | {peak / 2**20:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teachers", nargs="+", choices=("shapes", "mid"), default=["shapes", "mid"])
    parser.add_argument("--batch_size", type=int, default=8, help="samples per update, in groups of 4")
    parser.add_argument("--updates", type=int, default=5, help="updates whose time is measured")
    parser.add_argument("--layers", type=int, default=12, help="layers of mid")
    parser.add_argument("--heads", type=int, default=16, help="heads of mid, each 32 wide")
    options = parser.parse_args()
    for teacher in options.teachers:
        with tempfile.TemporaryDirectory() as directory:
            place: str | Path = "package:assets/shapes"
            if teacher == "mid":
                place = write_pipeline(Path(directory), options.layers, options.heads)
            for name in ("DMD", "GDMD"):
                module, measured = method(name, place), Measured(options.updates)
                train(module, options.updates + WARM_UP + 1, options.batch_size, 4, measured)
                size = sum(p.numel() for p in module.roles.standalone("teacher").parameters()) / 1e6
                print(
                    f"\n{name}, teacher {teacher} ({size:.1f} M parameters), {options.batch_size} samples per update:\n"
                )
                print("| part | ms | share | GFLOP | peak, MiB |\n|---|---|---|---|---|")
                print("\n".join(rows(measured)), flush=True)


if __name__ == "__main__":
    main()
