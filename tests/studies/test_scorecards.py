"""Scorecards on disk: intervals and test prompts are kept, and other prompts are refused."""

import pytest

from gdmd_lightning.errors import UserError
from gdmd_lightning.metrics.intervals import Interval
from gdmd_lightning.studies.scorecards import Row, Scorecard, TrainingCost, read_scorecard, write_scorecard

SCORES = {"shapes/overall": Interval(0.5, 0.4, 0.6), "geneval/colors": Interval(0.25, 0.25, 0.25)}
TRAINED = Row("DMD", 4, 0.01, SCORES, {"diversity": Interval(0.2, 0.1, 0.3)}, TrainingCost(2, 1088, 3.0))
CARD = Scorecard("shapes", 12, (TRAINED, Row("teacher", 60, 0.1, SCORES)))


def test_read_scorecard_returns_what_was_written(tmp_path):
    path = tmp_path / "new" / "scores.json"
    write_scorecard(CARD, path)
    assert read_scorecard(path, prompts="shapes", count=12) == CARD


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ({"count": 6}, "scored with count 12; count 6 requested; use another --out, or count 12"),
        ({"prompts": "p.txt"}, "scored with prompts shapes; prompts p.txt requested"),
    ],
)
def test_read_scorecard_refuses_other_prompts(tmp_path, requested, expected):
    write_scorecard(CARD, tmp_path / "scores.json")
    with pytest.raises(UserError, match=expected):
        read_scorecard(tmp_path / "scores.json", **{"prompts": "shapes", "count": 12, **requested})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"shapes/overall": 0.5}', '{"prompts": "shapes", "count": 12}'])
def test_read_scorecard_reports_a_file_of_another_form(tmp_path, content):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"scores\.json: not a readable scorecard: "):
        read_scorecard(path, prompts="shapes", count=12)
