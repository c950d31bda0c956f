"""What a comparison found: every score of every run, and statistics over its seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from gdmd_lightning.metrics.intervals import Interval
from gdmd_lightning.studies.scorecards import Row
from gdmd_lightning.studies.tasks import Task
from gdmd_lightning.studies.watch import WATCHED

NOT_MEASURED = "-"
"""In tables, a figure that an earlier version, which wrote a file of scores, did not have."""


class Estimate(NamedTuple):
    """A mean over seeds and half of its 95% t interval, ``None`` for one seed."""

    mean: float
    half: float | None

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return NOT_MEASURED
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean over seeds with a 95% t interval."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None)
    return Estimate(mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)))


def value(row: Row, name: str) -> float:
    """An overall score, or a watched figure, by its name; NaN for a figure that the row's file does not have."""
    if name in WATCHED:
        return row.watched[name].mean if name in row.watched else math.nan
    found: Interval = row.scores[f"{name}/overall"]
    return found.mean


@dataclass(frozen=True)
class Outcome:
    """The scores of a finished comparison.

    Args:
        task: Titles of the scores, and which one is compared.
        control: The method that others are compared with.
        seeds: The seeds.
        teacher: The teacher's rows; the first is the one to reach.
        starts: The start's row of each seed.
        methods: By method: for each seed the rows at each budget.
    """

    task: Task
    control: str
    seeds: tuple[int, ...]
    teacher: tuple[Row, ...]
    starts: tuple[Row, ...]
    methods: dict[str, tuple[tuple[Row, ...], ...]]

    def last(self, method: str) -> list[Row]:
        """The rows of a method at the end, one per seed."""
        return [rows[-1] for rows in self.methods[method]]

    def mean(self, method: str, name: str, point: int = -1) -> Estimate:
        """A score or watched figure of a method over seeds, by default at the end."""
        return estimate([value(rows[point], name) for rows in self.methods[method]])

    def over_teacher(self, method: str, name: str) -> Estimate:
        """Difference to the guided teacher; its interval is over seeds, with the prompts fixed."""
        best = value(self.teacher[0], name)
        return estimate([value(row, name) - best for row in self.last(method)])

    def over_control(self, method: str, name: str) -> Estimate:
        """Difference to the control, paired by seed."""
        pairs = zip(self.last(method), self.last(self.control), strict=True)
        return estimate([value(mine, name) - value(other, name) for mine, other in pairs])

    def entries(self) -> list[dict[str, Any]]:
        """Every row with its method and seed, as plain values."""
        rows: list[tuple[str, int | None, Row]] = [("teacher", None, row) for row in self.teacher]
        rows += [("start", seed, row) for seed, row in zip(self.seeds, self.starts, strict=True)]
        for name, per_seed in self.methods.items():
            rows += [(name, s, row) for s, points in zip(self.seeds, per_seed, strict=True) for row in points]
        return [{"method": name, "seed": seed, **asdict(row)} for name, seed, row in rows]
