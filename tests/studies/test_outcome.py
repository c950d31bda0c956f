"""Statistics of a comparison, its table and its sentences, on scores chosen by hand."""

import math
import re
from dataclasses import replace

import pytest

from gdmd_lightning.metrics.intervals import Interval
from gdmd_lightning.studies.outcome import Outcome, estimate, value
from gdmd_lightning.studies.page import _seconds, sentences, write_page
from gdmd_lightning.studies.scorecards import Row, TrainingCost
from gdmd_lightning.studies.tables import comparison_lines, score_table
from gdmd_lightning.studies.tasks import SHAPES
from gdmd_lightning.studies.watch import WATCHED

COST = TrainingCost(updates=2, evaluations=1088, seconds=3.0)


def row(name: str, level: float, training: TrainingCost | None = COST) -> Row:
    interval = Interval(level, level - 0.1, level + 0.1)
    scores = {f"{score}/overall": interval for score in SHAPES.titles}
    watched = {figure: Interval(level / 2, 0, 1) for figure in WATCHED}
    return Row(name, 4, 0.02, {**scores, "geneval/colors": Interval(0.25, 0.2, 0.3)}, watched, training)


def outcome(*seeds: tuple[float, float]) -> Outcome:
    """DMD and GDMD at the end, by seed; both at 0.1 halfway."""
    dmd, gdmd = zip(*seeds, strict=True)
    return Outcome(
        SHAPES,
        "DMD",
        tuple(range(len(seeds))),
        (row("teacher", 0.5, None),),
        tuple(row("start", 0.3) for _ in seeds),
        {
            name: tuple((row(name, 0.1), row(name, last)) for last in levels)
            for name, levels in (("DMD", dmd), ("GDMD", gdmd))
        },
    )


def test_score_table_shows_intervals_tasks_and_milliseconds():
    header, _, line = score_table([row("DMD", 0.5)]).splitlines()
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "generator", "NFE", "geneval", "shapes", "hps_like", "colors", "ms/picture"
    ]  # fmt: skip
    interval = "0.500 [0.400, 0.600]"
    assert [cell.strip() for cell in line.split("|")[1:-1]] == ["DMD", "4", *[interval] * 3, "0.25", "20.0"]


def test_comparison_lines_show_the_end_with_differences_to_the_teacher_and_to_the_control():
    lines = {line[0]: line for line in comparison_lines(outcome((0.4, 0.6)))}
    assert lines["generator"][1:10] == [
        "GenEval",
        "graded reward",
        "HPS-like",
        "diversity",
        "color bias",
        "position bias",
        "size bias",
        "latents' std",
        "latents' distance",
    ]
    assert lines["generator"][10:12] == ["graded reward, minus the teacher's", "graded reward, minus DMD's"]
    assert lines["teacher"][1:] == ["0.500"] * 3 + ["0.250"] * 6 + [""] * 5
    costs = ["2", "544", "1.50"]
    assert lines["start"][10:] == ["-0.200", "", *costs]
    assert lines["DMD"][10:] == ["-0.100", "", *costs]
    assert lines["GDMD"][1:] == ["0.600"] * 3 + ["0.300"] * 6 + ["0.100", "0.200", *costs]


def test_differences_are_paired_by_seed():
    found = outcome((0.2, 0.3), (0.6, 0.72), (0.4, 0.49)).over_control("GDMD", "shapes")
    t = 4.303  # 97.5% of the t distribution with 2 degrees of freedom
    deviation = 0.0152753  # of 0.1, 0.12, 0.09
    assert found.mean == pytest.approx(0.31 / 3)
    assert found.half == pytest.approx(t * deviation / 3**0.5, rel=1e-3)


def test_estimate_gives_the_t_interval():
    found = estimate([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.half == pytest.approx(4.303 * 0.1 / 3**0.5, rel=1e-3)
    assert str(found) == "0.200 ± 0.248"
    assert str(estimate([0.25])) == "0.250"


def test_mean_is_over_seeds_at_a_point():
    found = outcome((0.2, 0.3), (0.6, 0.7))
    assert found.mean("GDMD", "shapes").mean == pytest.approx(0.5)
    assert found.mean("GDMD", "shapes", point=0).mean == pytest.approx(0.1)
    assert found.mean("DMD", "diversity").mean == pytest.approx(0.2)


def test_sentences_say_what_the_intervals_allow():
    one, two = sentences(outcome((0.2, 0.61), (0.21, 0.62), (0.22, 0.63)))
    assert one == "DMD, graded reward: -0.290 ± 0.025, below the guided teacher."
    assert two == "GDMD, graded reward: +0.120 ± 0.025, above the guided teacher; +0.410 ± 0.000, above DMD."
    assert "not distinguishable from DMD" in sentences(outcome((0.2, 0.1), (0.2, 0.3), (0.2, 0.2)))[1]
    assert "(one seed, no interval)" in sentences(outcome((0.2, 0.1)))[0]


def test_entries_hold_every_row_with_its_method_and_seed():
    entries = outcome((0.2, 0.3), (0.6, 0.7)).entries()
    assert [entry["method"] for entry in entries] == ["teacher", "start", "start", *["DMD"] * 4, *["GDMD"] * 4]
    last = entries[-1]
    assert (last["seed"], last["scores"]["shapes/overall"]["mean"], last["training"]["evaluations"]) == (1, 0.7, 1088)


def test_value_reads_scores_and_watched_figures():
    assert value(row("x", 0.4), "geneval") == 0.4
    assert value(row("x", 0.4), "diversity") == 0.2


@pytest.fixture
def older() -> Outcome:
    """An outcome whose files of scores lack one of the watched figures."""
    found = outcome((0.4, 0.6), (0.5, 0.7))
    for each in (*found.teacher, *found.starts, *(r for seeds in found.methods.values() for rs in seeds for r in rs)):
        del each.watched["latent_distance"]
    return found


def test_a_figure_that_older_scores_lack_is_shown_as_not_measured(older):
    lines = {line[0]: line for line in comparison_lines(older)}
    assert [lines[name][9] for name in ("generator", "teacher", "start", "GDMD")] == ["latents' distance", *"---"]
    assert lines["GDMD"][8] == "0.325 ± 0.318"


def test_seconds_that_are_not_known_are_shown_as_not_measured():
    one, other = outcome((0.4, 0.6)), replace(COST, seconds=None)
    last = {name: (((*rows[0][:-1], replace(rows[0][-1], training=other)),)) for name, rows in one.methods.items()}
    found = replace(one, methods={**last, "DMD": one.methods["DMD"]})
    assert {line[0]: line[-1] for line in comparison_lines(found)[2:]} == {"start": "1.50", "DMD": "1.50", "GDMD": "-"}
    assert math.isnan(_seconds(found.last("GDMD")[0]))


@pytest.mark.slow
def test_the_page_joins_the_points_of_each_run_in_one_color_per_method(older, tmp_path):
    (tmp_path / "pictures.png").write_bytes(b"")
    write_page(tmp_path / "index.html", older, {}, tmp_path / "pictures.png")
    page = (tmp_path / "index.html").read_text()
    assert page.count("<td>-</td>") == 4
    figure = page.split("what it does not see</h2>")[1].split("</svg>")[0]
    for color in ("#1f77b4", "#ff7f0e"):  # one line per seed in each plot that has figures
        drawn = re.findall(rf'<path d="M[^"]+"[^>]*stroke: {color}; stroke-opacity: 0.6; stroke-width: 0.5', figure)
        assert len(drawn) == 2 * 7
