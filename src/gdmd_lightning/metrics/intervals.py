"""Means of values by task and by part, with 95% bootstrap intervals over what was drawn at random."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_TASK = "all"
RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Value:
    """A picture's value of a score.

    Args:
        value: The value.
        parts: Values of its parts, such as the answers to a prompt's questions.
    """

    value: float
    parts: tuple[float, ...] = ()


@dataclass(frozen=True)
class Units:
    """Values by the unit that was drawn at random: a prompt with all its pictures, or a single picture.

    Args:
        sums: Of the values of each unit, ``[N]``.
        sizes: Number of its values, positive, ``[N]``.
    """

    sums: Any
    sizes: Any

    @staticmethod
    def single(values: Any) -> Units:
        """Every value is a unit of its own, ``[N]``."""
        return Units(values, np.ones(len(values)))

    @staticmethod
    def of(values: Iterable[float], owners: Sequence[Hashable]) -> Units:
        """Group values by their owners."""
        numbers = {owner: number for number, owner in enumerate(dict.fromkeys(owners))}
        rows = [numbers[owner] for owner in owners]
        return Units(np.bincount(rows, weights=np.fromiter(values, float)), np.bincount(rows))


def exact_mean(values: Tensor) -> Tensor:
    """Mean of ``[N]`` in float64 on the CPU, of the exact sum: ranks and batches may order the values in any way.

    NaN if there is none.
    """
    mean = math.fsum(values.tolist()) / len(values) if len(values) else math.nan
    return torch.tensor(mean, dtype=torch.float64)


def bootstrap(tasks: Sequence[Units]) -> Interval:
    """The mean within each task, averaged over the tasks, with the 95% interval of resampling units within tasks.

    A task with a single unit says nothing about its spread and adds none.
    """
    from scipy.stats import bootstrap as resampled

    def mean_of_means(*rows: Any, axis: int = -1) -> Any:
        means = [
            task.sums[mine].sum(axis=axis) / task.sizes[mine].sum(axis=axis)
            for task, mine in zip(tasks, rows, strict=True)
        ]
        return sum(means) / len(means)

    mean = float(mean_of_means(*(np.arange(len(task.sums)) for task in tasks)))
    each = [task.sums / task.sizes for task in tasks]
    if all(values.min() == values.max() for values in each):
        return Interval(mean, mean, mean)
    # scipy wants two observations: a single one is drawn twice, which is the same mean.
    rows = [np.arange(len(values)) if len(values) > 1 else np.zeros(2, dtype=int) for values in each]
    # Percentile method: bias correction is undefined if all units of a task have the same value.
    found = resampled(rows, mean_of_means, n_resamples=RESAMPLES, method="percentile", rng=0).confidence_interval
    return Interval(mean, float(found.low), float(found.high))


def intervals(
    values: Sequence[Value], tasks: Sequence[str], names: Sequence[Sequence[str]], owners: Sequence[Hashable]
) -> dict[str, Interval]:
    """``overall``, if there are tasks each of them, and each name of parts: means over pictures, or over parts.

    Args:
        values: Of each picture.
        tasks: The task of each picture.
        names: Names of the parts of each picture.
        owners: What drew each picture: its prompt; a mean's interval is over owners.
    """
    rows: dict[str, list[int]] = {}
    for row, task in enumerate(tasks):
        rows.setdefault(task, []).append(row)
    by_task = {
        task: Units.of((values[row].value for row in mine), [owners[row] for row in mine])
        for task, mine in rows.items()
    }
    found = {"overall": bootstrap(list(by_task.values()))}
    if list(by_task) != [NO_TASK]:
        found |= {task: bootstrap([units]) for task, units in by_task.items()}
    parts: dict[str, list[tuple[float, Hashable]]] = {}
    for value, named, owner in zip(values, names, owners, strict=True):
        for part, name in zip(value.parts, named, strict=True):
            parts.setdefault(name, []).append((part, owner))
    return found | {
        name: bootstrap([Units.of((part for part, _ in mine), [owner for _, owner in mine])])
        for name, mine in parts.items()
    }
