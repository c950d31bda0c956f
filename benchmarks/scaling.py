"""Time and memory of an update of GDMD by model size, samples, group size and targets: measured, and fitted.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/scaling.py [--sizes 2x4 4x6 6x8 8x12 12x16] [--updates N] [--output DIR]

SD3 networks with random weights train on the CPU with one thread: 2 steps, 2 fake-score updates, 32x32 pixels. Seconds
are those of the processor, not of the clock, so that other processes disturb them less. Memory is the most bytes of
tensors alive. Two models with a reason are fitted by least squares of relative errors:

    seconds = a + b FLOPs + c parameters         FLOPs by closed form; optimizers and averages touch each parameter
    peak bytes = a + k weights + l rows activations  encoders and decoder; rows with a gradient at once; of one row

Each largest value (size, samples, targets) is left out of one fit and predicted by it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from evaluations import expected, networks
from random_teachers import method, train, write_pipeline
from scipy.optimize import nnls
from scipy.stats import t as student
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.planning.trace import FusedAttention, Trace

STEPS, FAKE_SCORE_UPDATES = 2, 2
META = torch.device("meta")


@dataclass(frozen=True)
class Row:
    """One latent in one network, without guidance.

    Args:
        parameters: Numbers of the network.
        flops: Floating-point operations of a forward pass.
        activations: Bytes that a forward pass keeps for its backward pass.
        decoding: Floating-point operations that decode one latent.
    """

    parameters: int
    flops: int
    activations: int
    decoding: int


@dataclass(frozen=True)
class Point:
    """What is measured: a network and a batch.

    Args:
        size: Layers and 32-wide heads.
        samples: Per update.
        group: Samples per prompt.
        targets: Per sample.
    """

    size: tuple[int, int]
    samples: int = 8
    group: int = 4
    targets: int = 2

    @property
    def learning(self) -> int:
        """Rows with a backward pass per update: the generator's own and its targets', and the fake score's."""
        return self.samples * (1 + self.targets + FAKE_SCORE_UPDATES)

    @property
    def at_once(self) -> int:
        """Rows with a gradient in the generator's step."""
        return self.samples * (1 + self.targets)

    def flops(self, row: Row) -> float:
        """Of an update, in closed form: a backward pass costs two evaluations."""
        numbers = {"K": STEPS, "C": FAKE_SCORE_UPDATES, "M": self.targets, "S": 1, "E": 1}
        evaluations = self.samples * networks(expected("GDMD, `policy.at: target`", numbers))
        return row.flops * (evaluations + 2 * self.learning) + row.decoding * self.samples * self.targets


@dataclass(frozen=True)
class Found:
    """A measurement.

    Args:
        seconds: Mean of the processor's seconds of an update.
        half: Half of their 95% interval, Student's; NaN for a single update.
        peak: Most bytes alive in an update.
    """

    seconds: float
    half: float
    peak: int


@dataclass(frozen=True)
class Fit:
    """Coefficients of a linear model without further constants, and the relative errors on its own points."""

    coefficients: tuple[float, ...]
    error: float

    def __call__(self, features: Sequence[float]) -> float:
        return float(np.dot(self.coefficients, features))


def fit(features: Sequence[Sequence[float]], values: Sequence[float]) -> Fit:
    """Least squares of relative errors, of costs that are not negative; ``error`` is their median magnitude."""
    matrix, y = np.asarray(features, dtype=float), np.asarray(values, dtype=float)
    scale = matrix.max(0)
    found = nnls(matrix / scale / y[:, None], np.ones_like(y))[0] / scale
    return Fit(tuple(map(float, found)), float(np.median(np.abs(matrix @ found / y - 1))))


def row_of(family: ModelFamily, height: int, width: int) -> Row:
    """Follow one evaluation on the meta device."""
    network = family.sketch().requires_grad_()
    blank, dtype = family.blank_conditioning(META), next(network.parameters()).dtype

    def evaluate(rows: int) -> Any:
        x = torch.empty(rows, *family.latent_shape(height, width), device=META, dtype=dtype)
        return family.velocity(network, x, torch.empty(rows, device=META), type(blank).concat([blank] * rows))

    def kept(rows: int) -> int:
        trace = Trace()
        trace.hold(network)
        with FusedAttention(), trace:
            out = evaluate(rows)
            return trace.current + 0 * len(out)

    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        evaluate(1)
    with torch.no_grad(), FlopCounterMode(display=False) as decoding:
        family.decode(torch.empty(1, *family.latent_shape(height, width), device=META, dtype=dtype))
    parameters = sum(p.numel() for p in network.parameters())
    return Row(parameters, forward.get_total_flops(), kept(2) - kept(1), decoding.get_total_flops())


class Measured(pl.Callback):
    """Processor seconds of updates after the first, and the peak of the last, which is not timed."""

    def __init__(self, updates: int) -> None:
        self.last, self.seconds, self.peak = updates + 1, [0.0] * 0, 0

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        self._inside = ExitStack()
        if module.updates == self.last:
            self._trace = self._inside.enter_context(traced(trainer, module))
        self._began = time.process_time()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        passed = time.process_time() - self._began
        self._inside.close()
        if module.updates > self.last:
            self.peak = self._trace.peak
        elif module.updates > 1:
            self.seconds.append(passed)


def traced(trainer: pl.Trainer, module: Any) -> Trace:
    """A trace that knows weights, optimizer states, and the parts of the pipeline."""
    trace = Trace("cpu")
    trace.hold(module)
    trace.see(t for o in trainer.optimizers for state in o.state.values() for t in state.values())
    for part in module.family.loaded.components.values():
        if isinstance(part, nn.Module):
            trace.hold(part)
    return trace


def measure(point: Point, pipeline: Path, updates: int) -> Found:
    """Train for the updates, one before them, and one after them that is followed."""
    module = method("GDMD", pipeline, point.targets, FAKE_SCORE_UPDATES, STEPS)
    measured = Measured(updates)
    train(module, updates + 2, point.samples, point.group, measured)
    seconds = measured.seconds
    half = float("nan")
    if len(seconds) > 1:
        half = float(student.ppf(0.975, len(seconds) - 1)) * statistics.stdev(seconds) / len(seconds) ** 0.5
    return Found(statistics.fmean(seconds), half, measured.peak)


def points_of(sizes: Sequence[tuple[int, int]]) -> list[Point]:
    """All sizes with the same batch, and other batches with the second size (or the only one)."""
    other = sizes[min(1, len(sizes) - 1)]
    samples = [Point(other, samples=n) for n in (16, 32)]
    groups = [Point(other, samples=16, group=n) for n in (2, 8)]
    targets = [Point(other, targets=n) for n in (1, 4, 8)]
    return [*(Point(size) for size in sizes), *samples, *groups, *targets]


def features(point: Point, row: Row) -> dict[str, list[float]]:
    """What the two models are linear in."""
    time_of = [1.0, point.flops(row), float(row.parameters)]
    return {"seconds": time_of, "peak": [1.0, 4.0 * row.parameters, float(point.at_once * row.activations)]}


def held_out(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points with the largest value of each quantity."""
    found = {}
    for name in ("size", "samples", "targets"):
        most = max(getattr(point, name) for point in points)
        found[name] = [point for point in points if getattr(point, name) == most]
    return found


def fitted(rows: dict[tuple[int, int], Row], found: dict[Point, Found]) -> dict[str, Any]:
    """Both models on all points, and their errors on points that were left out."""
    result: dict[str, Any] = {}
    for name in ("seconds", "peak"):

        def on(points: Sequence[Point], name: str = name) -> Fit:
            return fit([features(p, rows[p.size])[name] for p in points], [getattr(found[p], name) for p in points])

        errors = {}
        for what, left in held_out(list(found)).items():
            rest = [point for point in found if point not in left]
            if len(rest) > len(features(left[0], rows[left[0].size])[name]):
                model = on(rest)
                errors[what] = [model(features(p, rows[p.size])[name]) / getattr(found[p], name) - 1 for p in left]
        everything = on(list(found))
        result[name] = {**asdict(everything), "held_out": errors}
    return result


def lines(rows: dict[tuple[int, int], Row], found: dict[Point, Found], fits: dict[str, Any]) -> Iterator[str]:
    """The measurements and the fits as Markdown."""
    yield "| parameters, M | samples | group | targets | GFLOP | s, 95% interval | fit | peak, MiB | fit |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for point, each in found.items():
        row = rows[point.size]
        guess = {name: float(np.dot(fits[name]["coefficients"], features(point, row)[name])) for name in fits}
        cells = [f"{row.parameters / 1e6:.1f}", point.samples, point.group, point.targets]
        cells += [f"{point.flops(row) / 1e9:.1f}", f"{each.seconds:.3f} ± {each.half:.3f}", f"{guess['seconds']:.3f}"]
        cells += [f"{each.peak / 2**20:.0f}", f"{guess['peak'] / 2**20:.0f}"]
        yield f"| {' | '.join(map(str, cells))} |"
    a, b, c = fits["seconds"]["coefficients"]
    fixed, k, activations = fits["peak"]["coefficients"]
    yield f"\nseconds = {a:.3g} + FLOPs / {1 / b / 1e9:.3g}e9 + {1e9 * c:.3g} ns per parameter"
    memory = f"{k:.3g} x weights + {activations:.3g} x rows with a gradient x activations of a row"
    yield f"peak = {fixed / 2**20:.3g} MiB + {memory}"
    yield "\n| fit of | median error | left out: largest size | most samples | most targets |\n|---|---|---|---|---|"
    for name, model in fits.items():
        errors = [", ".join(f"{e:+.1%}" for e in model["held_out"].get(w, ())) for w in ("size", "samples", "targets")]
        yield f"| {name} | {model['error']:.1%} | {' | '.join(errors)} |"


def draw(rows: dict[tuple[int, int], Row], found: dict[Point, Found], fits: dict[str, Any], file: Path) -> None:
    """Measured against fitted, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3.6), layout="constrained")
    for axis, (name, unit, factor) in zip(axes, (("seconds", "s", 1.0), ("peak", "MiB", 2.0**-20)), strict=True):
        values = [factor * getattr(each, name) for each in found.values()]
        guess = [factor * float(np.dot(fits[name]["coefficients"], features(p, rows[p.size])[name])) for p in found]
        axis.loglog(guess, values, "o")
        axis.loglog([min(guess), max(guess)], [min(guess), max(guess)], "k:", linewidth=1)
        axis.set(xlabel=f"fitted, {unit}", ylabel=f"measured, {unit}", title=f"{name} of an update of GDMD")
    figure.savefig(file, dpi=90)
    pyplot.close(figure)


def size_of(text: str) -> tuple[int, int]:
    """``4x6``: layers and heads."""
    layers, _, heads = text.partition("x")
    if not (layers.isdigit() and heads.isdigit() and int(layers) and int(heads)):
        raise argparse.ArgumentTypeError(f"{text!r} is not layers x heads, such as 4x6")
    return int(layers), int(heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = ["2x4", "4x6", "6x8", "8x12", "12x16"]
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[size_of(each) for each in default])
    parser.add_argument("--updates", type=int, default=4, help="updates whose time is measured")
    parser.add_argument("--output", type=Path, help="directory for scaling.json and scaling.png")
    options = parser.parse_args()
    if options.updates < 1:
        parser.error("--updates must be at least 1")
    sizes = sorted(set(options.sizes))
    rows: dict[tuple[int, int], Row] = {}
    found: dict[Point, Found] = {}
    with tempfile.TemporaryDirectory() as directory:
        for size in sizes:
            place = write_pipeline(Path(directory) / f"{size[0]}x{size[1]}", *size)
            rows[size] = row_of(SD3Family(str(place), max_sequence_length=0), 32, 32)
        for point in points_of(sizes):
            place = Path(directory) / f"{point.size[0]}x{point.size[1]}"
            found[point] = measure(point, place, options.updates)
    fits = fitted(rows, found)
    print("\n".join(lines(rows, found, fits)))
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        measured = [{**asdict(p), **asdict(rows[p.size]), **asdict(each)} for p, each in found.items()]
        content = json.dumps({"measured": measured, "fits": fits}, indent=1)
        (options.output / "scaling.json").write_text(content + "\n", encoding="utf-8")
        draw(rows, found, fits, options.output / "scaling.png")


if __name__ == "__main__":
    main()
