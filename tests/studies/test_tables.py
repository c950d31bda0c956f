"""Markdown tables of scorecards."""

import pytest

from gdmd_lightning.metrics.scores import Interval
from gdmd_lightning.studies.scorecards import Row, TrainingCost
from gdmd_lightning.studies.tables import comparison_table, over_seeds, score_table
from gdmd_lightning.studies.tasks import SHAPES


def row(name: str, value: float, training: TrainingCost | None = TrainingCost(544, 1.5)) -> Row:
    scores = {f"{score}/overall": Interval(value, value - 0.1, value + 0.1) for score in SHAPES.titles}
    return Row(name, 4, 0.02, {**scores, "geneval/colors": Interval(0.25, 0.2, 0.3)}, training)


def test_score_table_shows_intervals_tasks_and_milliseconds():
    header, _, line = score_table([row("DMD", 0.5)]).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "generator", "NFE", "geneval", "shapes", "hps_like", "colors", "ms/picture"
    ]  # fmt: skip
    interval = "0.500 [0.400, 0.600]"
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["DMD", "4", *[interval] * 3, "0.25", "20.0"]


def test_comparison_table_shows_differences_to_the_teacher_and_to_dmd():
    arms = {"DMD": [row("DMD", 0.4)], "GDMD": [row("GDMD", 0.6)]}
    text = comparison_table(SHAPES, [row("teacher", 0.5, None)], {"start": [row("DMD", 0.3)]}, arms)
    cells = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[5:-1]] for line in text.splitlines()}
    assert cells["generator"][:2] == ["graded reward, minus the teacher's", "graded reward, minus DMD's"]
    assert cells["teacher"] == ["", "", "", ""]
    assert cells["start, 4 steps"] == ["-0.200", "", "544", "1.50"]
    assert cells["DMD, 4 steps"] == ["-0.100", "", "544", "1.50"]
    assert cells["GDMD, 4 steps"] == ["0.100", "0.200", "544", "1.50"]


def test_over_seeds_gives_the_t_interval():
    mean, half = map(float, over_seeds([0.1, 0.2, 0.3]).split(" ± "))
    assert mean == 0.2
    quantile = 4.303  # 97.5% of the t distribution with 2 degrees of freedom
    assert half == pytest.approx(quantile * 0.1 / 3**0.5, abs=1e-3)
    assert over_seeds([0.25]) == "0.250"
