"""What the loggers of a run have written, read back."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path


def read_figures(run: Path, prefix: str) -> dict[str, list[tuple[int, float]]]:
    """Pairs of update and value of every logged scalar whose name starts with a prefix.

    Args:
        run: The run's directory, with TensorBoard's event files or a ``metrics.csv``; others are not read.
        prefix: Such as ``eval/``.

    Returns:
        By name, sorted by update; where an update was logged twice, as by a resumed run, its last value.
    """
    found: dict[str, dict[int, float]] = {}
    for name, update, value in [*_csv(Path(run)), *_tensorboard(Path(run))]:
        if name.startswith(prefix):
            found.setdefault(name, {})[update] = value
    return {name: sorted(values.items()) for name, values in sorted(found.items())}


def _csv(run: Path) -> Iterator[tuple[str, int, float]]:
    path = run / "metrics.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                yield from ((name, int(row["step"]), float(value)) for name, value in row.items() if value)


def _tensorboard(run: Path) -> Iterator[tuple[str, int, float]]:
    if not any(run.glob("events.out.tfevents.*")):
        return
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(run), size_guidance={SCALARS: 0})
    events.Reload()
    for name in events.Tags()["scalars"]:
        yield from ((name, event.step, event.value) for event in events.Scalars(name))
