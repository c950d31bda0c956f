"""Scorecards as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from gdmd_lightning.studies.folders import FolderScores
from gdmd_lightning.studies.outcome import NOT_MEASURED, Outcome, estimate, value
from gdmd_lightning.studies.scorecards import Row
from gdmd_lightning.studies.watch import WATCHED


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
    return _aligned(lines)


def folder_table(rows: Sequence[FolderScores]) -> str:
    """One line per directory of pictures: overall scores with 95% intervals, then tasks and parts such as skills."""
    names = list(dict.fromkeys(name for row in rows for name in row.scores))
    overall = [name for name in names if name.endswith("/overall")]
    tasks = [name for name in names if name not in overall]
    header = ["pictures of", "pictures", "prompts", *(name.removesuffix("/overall") for name in overall), *tasks]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        cells = [row.name, str(row.pictures), str(row.prompts), *(str(row.scores[name]) for name in overall)]
        lines.append(cells + [f"{row.scores[name].mean:.3f}" if name in row.scores else "-" for name in tasks])
    return _aligned(lines)


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(_line([c.ljust(w) for c, w in zip(line, widths, strict=True)]) for line in lines)


def comparison_table(outcome: Outcome) -> str:
    """Scores and watched figures as means over seeds, with differences to the teacher and to the control."""
    lines = comparison_lines(outcome)
    return "\n".join([_line(lines[0]), "|" + "---|" * len(lines[0]), *(_line(line) for line in lines[1:])])


def comparison_lines(outcome: Outcome) -> list[list[str]]:
    """The cells of :func:`comparison_table`, the header first."""
    task = outcome.task
    figures = {**task.titles, **WATCHED}
    compared = task.titles[task.compared]
    header = [
        "generator",
        *figures.values(),
        f"{compared}, minus the teacher's",
        f"{compared}, minus {outcome.control}'s",
        "updates",
        "evaluations/update",
        "s/update",
    ]
    lines = [header]
    for row in outcome.teacher:
        lines.append([row.name, *_figures([row], figures), "", "", "", "", ""])
    best = value(outcome.teacher[0], task.compared)
    above = estimate([value(row, task.compared) - best for row in outcome.starts])
    lines.append(["start", *_figures(outcome.starts, figures), str(above), "", *_costs(outcome.starts)])
    for name in outcome.methods:
        rows = outcome.last(name)
        paired = "" if name == outcome.control else str(outcome.over_control(name, task.compared))
        above = outcome.over_teacher(name, task.compared)
        lines.append([name, *_figures(rows, figures), str(above), paired, *_costs(rows)])
    return lines


def _figures(rows: Sequence[Row], names: Iterable[str]) -> list[str]:
    return [str(estimate([value(row, name) for row in rows])) for name in names]


def _costs(rows: Sequence[Row]) -> list[str]:
    costs = [row.training for row in rows if row.training is not None]
    updates = sum(cost.updates for cost in costs)
    evaluations = sum(cost.evaluations for cost in costs)
    known = [cost.seconds for cost in costs if cost.seconds is not None]
    seconds = f"{sum(known) / updates:.2f}" if len(known) == len(costs) else NOT_MEASURED
    return [f"{updates / len(costs):.0f}", f"{evaluations / updates:.0f}", seconds]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
