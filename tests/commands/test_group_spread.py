"""The benchmark that measures what groups of samples can teach."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "group_spread.py"


def test_figures_of_known_scores():
    summary = runpy.run_path(str(SCRIPT))["summary"]
    graded = [[0.0, 1.0, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]]
    verdicts = [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]
    scores = torch.stack([torch.tensor(graded), torch.tensor(verdicts)], dim=1)
    pairs = summary(scores, 2)
    assert pairs["graded"] == pytest.approx(0.75)
    assert pairs["std"] == pytest.approx(0.5**0.5 / 4)  # one of four groups differs
    assert pairs["correct"] == pytest.approx(1 / 8)
    assert pairs["mixed"] == pytest.approx(1 / 4)
    assert pairs["any"] == pytest.approx(1 / 2)


def test_a_table_by_task_and_the_same_figures_in_a_file(recorded_run, tmp_path, monkeypatch, capsys):
    last, out = str(recorded_run / "checkpoints" / "last.ckpt"), tmp_path / "spread.json"
    options = ["--count", "12", "--samples", "4", "--group_size", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), last, *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    figures = json.loads(out.read_text())[last]
    rows = [line.split(" | ")[0].strip("| ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows == ["task", *figures]
    assert rows[-1] == "all"
    assert len(figures) == 7  # six tasks
    assert all(0 <= row["graded"] <= 1 and row["std"] > 0 for row in figures.values())


def test_samples_that_are_no_groups_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "none.ckpt", "--samples", "6"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert "give a multiple of --group_size" in capsys.readouterr().err
