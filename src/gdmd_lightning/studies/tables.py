"""Scorecards as Markdown tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gdmd_lightning.studies.scorecards import Row
from gdmd_lightning.studies.tasks import Task

CONTROL = "DMD"


def score_table(rows: Sequence[Row]) -> str:
    """One line per generator: overall scores with 95% intervals, GenEval by task, ms per picture."""
    names = list(rows[0].scores)
    overall = [name for name in names if name.endswith("/overall")]
    tasks = [name for name in names if name.startswith("geneval/") and name not in overall]
    header = ["generator", "NFE", *(name.removesuffix("/overall") for name in overall)]
    header += [name.removeprefix("geneval/") for name in tasks] + ["ms/picture"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.name, str(row.evaluations), *(str(row.scores[name]) for name in overall)]
        cells += [f"{row.scores[name].mean:.2f}" for name in tasks] + [f"{1000 * row.seconds:.1f}"]
        lines.append(cells)
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(_line([c.ljust(w) for c, w in zip(line, widths, strict=True)]) for line in lines)


def comparison_table(
    task: Task, teacher: Sequence[Row], cold_start: Mapping[str, Sequence[Row]], arms: Mapping[str, Sequence[Row]]
) -> str:
    """Overall scores as means over seeds, with differences to the teacher and to the control.

    Args:
        task: Titles of the scores, and which one is compared.
        teacher: The teacher's rows; differences are to the first.
        cold_start: The start's rows by its name, one per seed.
        arms: Each arm's rows by its name, one per seed in the same order; the control is :data:`CONTROL`.
    """
    compared = task.titles[task.compared]
    titles = [*task.titles.values(), f"{compared}, minus the teacher's", f"{compared}, minus {CONTROL}'s"]
    header = ["generator", *titles, "evaluations/update", "s/update"]
    lines = [_line(header), "|" + "---|" * len(header)]
    for row in teacher:
        cells = [row.name, *(f"{_overall(row, name):.3f}" for name in task.titles)]
        lines.append("| " + " | ".join(cells) + " |" + " |" * 4)
    best = _overall(teacher[0], task.compared)
    control = [_overall(row, task.compared) for row in arms.get(CONTROL, ())]
    for name, rows in {**cold_start, **arms}.items():
        mine = [_overall(row, task.compared) for row in rows]
        cells = [over_seeds([_overall(row, score) for row in rows]) for score in task.titles]
        cells.append(over_seeds([value - best for value in mine]))
        paired = control and name in arms and name != CONTROL
        cells.append(over_seeds([a - b for a, b in zip(mine, control, strict=True)]) if paired else "")
        costs = [row.training for row in rows if row.training is not None]
        cells.append(f"{sum(cost.evaluations for cost in costs) / len(costs):.0f}")
        cells.append(f"{sum(cost.seconds for cost in costs) / len(costs):.2f}")
        lines.append(_line([f"{name}, {rows[0].evaluations} steps", *cells]))
    return "\n".join(lines)


def over_seeds(values: Sequence[float]) -> str:
    """Mean over seeds with a 95% t interval; the mean alone for one seed."""
    from scipy import stats

    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
    return f"{mean:.3f} ± {half:.3f}"


def _overall(row: Row, score: str) -> float:
    return row.scores[f"{score}/overall"].mean


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
