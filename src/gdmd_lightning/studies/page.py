"""The page of a comparison: one HTML file without scripts, fonts or network, with its figures as SVG."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from gdmd_lightning.files import write_atomically
from gdmd_lightning.locations import resolve
from gdmd_lightning.studies.outcome import Outcome, estimate, value
from gdmd_lightning.studies.scorecards import Row
from gdmd_lightning.studies.tables import comparison_lines
from gdmd_lightning.studies.watch import WATCHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "package:assets/pages/compare.html"


def write_page(path: Path, outcome: Outcome, settings: Mapping[str, Any], pictures: Path) -> None:
    """Write the page of a comparison, complete or not at all.

    Args:
        path: The file to write.
        outcome: What was found.
        settings: The comparison's configuration.
        pictures: PNG of every generator's pictures from the same noise; embedded.
    """
    from jinja2 import Environment, StrictUndefined

    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(
        Path(resolve(TEMPLATE)).read_text(encoding="utf-8")
    )
    task = outcome.task
    header, *lines = comparison_lines(outcome)
    content = template.render(
        task=task,
        outcome=outcome,
        header=header,
        lines=lines,
        sentences=sentences(outcome),
        by_evaluations=_curves(outcome, _evaluations),
        by_seconds=_curves(outcome, _seconds),
        trained_against_watched=_against(outcome),
        pictures=base64.b64encode(pictures.read_bytes()).decode(),
        settings=yaml.safe_dump(dict(settings), sort_keys=False),
    )
    write_atomically(path, content)


def sentences(outcome: Outcome) -> list[str]:
    """What the intervals say of each method, against the teacher and against the control, in words."""
    task, out = outcome.task, []
    title = task.titles[task.compared]
    for name in outcome.methods:
        parts = [f"{_verdict(outcome.over_teacher(name, task.compared))} the guided teacher"]
        if name != outcome.control:
            parts.append(f"{_verdict(outcome.over_control(name, task.compared))} {outcome.control}")
        out.append(f"{name}, {title}: {'; '.join(parts)}.")
    return out


def _verdict(difference: Any) -> str:
    if difference.half is None:
        return f"{difference.mean:+.3f} (one seed, no interval) against"
    if abs(difference.mean) <= difference.half:
        return f"{difference.mean:+.3f} ± {difference.half:.3f}, not distinguishable from"
    return f"{difference.mean:+.3f} ± {difference.half:.3f}, {'above' if difference.mean > 0 else 'below'}"


def _evaluations(row: Row) -> float:
    return 0.0 if row.training is None else row.training.evaluations / 1000


def _seconds(row: Row) -> float:
    if row.training is None:
        return 0.0
    return math.nan if row.training.seconds is None else row.training.seconds / 60  # a point that is not drawn


def _curves(outcome: Outcome, cost: Callable[[Row], float]) -> str:
    """Every score over the cost of training, with its interval over seeds and the teacher as a line."""
    names = {**outcome.task.titles, **WATCHED}

    def draw(axes: list[Axes]) -> None:
        for place, (name, title) in zip(axes, names.items(), strict=True):
            place.axhline(value(outcome.teacher[0], name), color="black", linestyle=":", label="teacher, guided")
            for method, per_seed in outcome.methods.items():
                points = [outcome.starts, *zip(*per_seed, strict=True)]
                # A method starts at no cost, whatever its start took.
                x = [0.0, *(sum(map(cost, rows)) / len(rows) for rows in points[1:])]
                y = [estimate([value(row, name) for row in rows]) for rows in points]
                (line,) = place.plot(x, [each.mean for each in y], marker="o", markersize=3, label=method)
                low, high = ([each.mean + side * (each.half or 0) for each in y] for side in (-1, 1))
                place.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
            place.set_title(title, fontsize=9)
            place.set_xlabel("thousand evaluations" if cost is _evaluations else "minutes", fontsize=8)

    return _svg(len(names), draw)


def _against(outcome: Outcome) -> str:
    """The compared score of every run at every point against each score and figure that it is not."""
    task = outcome.task
    names = {name: title for name, title in {**task.titles, **WATCHED}.items() if name != task.compared}

    def draw(axes: list[Axes]) -> None:
        for place, (name, title) in zip(axes, names.items(), strict=True):
            best = outcome.teacher[0]
            place.plot(value(best, task.compared), value(best, name), "k*", label="teacher, guided")
            for number, (method, per_seed) in enumerate(outcome.methods.items()):
                for i, points in enumerate(per_seed):
                    # From the start on, so that a line shows the way that a run has gone.
                    x, y = ([value(row, key) for row in (outcome.starts[i], *points)] for key in (task.compared, name))
                    place.plot(x, y, color=f"C{number}", linewidth=0.5, alpha=0.6)
                    place.plot(x[1:], y[1:], "o", color=f"C{number}", markersize=3, label=method if i == 0 else None)
            place.set_xlabel(task.titles[task.compared], fontsize=8)
            place.set_title(title, fontsize=9)

    return _svg(len(names), draw)


def _svg(count: int, draw: Callable[[list[Axes]], None], columns: int = 3) -> str:
    """A figure of ``count`` plots and one legend as an SVG element that scales with the page."""
    import matplotlib
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    # Text as text can be selected and read aloud. A fixed salt makes the same figure the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "gdmd", "font.size": 8}):
        figure = Figure(figsize=(3.2 * columns, 2.5 * rows + 0.4))
        axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
        draw(axes)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=4, fontsize=8, frameon=False)
        figure.tight_layout(rect=(0, 0.06 if rows > 1 else 0.1, 1, 1))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    _, size, rest = re.split(r"<svg ([^>]*)>", file.getvalue(), maxsplit=1)
    size = re.sub(r'\b(width|height)="[^"]*" ?', "", size)  # the page sets the width, the view box the rest
    return f'<svg class="figure" {size}>{rest}'
