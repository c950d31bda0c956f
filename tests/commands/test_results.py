"""The comparison over seeds on the embedded pipeline, in a few updates."""

import json
import re
from pathlib import Path

import pytest
import torch

from gdmd_lightning.cli import main
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.metrics.scores import Interval
from gdmd_lightning.studies.scorecards import Row, Scorecard, TrainingCost, read_scorecard, write_scorecard

CHEAP = ["--data.batch_size=8", "--data.group_size=4", "--model.matching.fake_score_updates=1"]
FIT = f"--fit={json.dumps(CHEAP)}"


def overall(path: Path, score: str = "shapes", count: int = 12) -> float:
    """The first row's overall score in a file of results."""
    return read_scorecard(path, prompts="shapes", count=count).rows[0].scores[f"{score}/overall"].mean


def test_results_compares_arms_over_seeds_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    arguments = ["results", "--seeds=[0,1]", "--cold_start=1", "--updates=1", "--count=12", FIT]
    main(arguments)
    out = tmp_path / "runs" / "results"
    report = (out / "results.md").read_text()
    assert report in capsys.readouterr().out
    assert re.search(r"^\| DMD, 4 steps \| \d\.\d{3} ± \d", report, re.MULTILINE)
    paired = re.search(
        r"^\| GDMD, 4 steps (?:\|[^|]*){3}\| (-?\d\.\d{3}) ±[^|]*\| (-?\d\.\d{3}) ±", report, re.MULTILINE
    )
    assert paired is not None
    dmd, gdmd = ([overall(out / f"seed{s}" / arm / "scores_1.json") for s in (0, 1)] for arm in ("dmd", "gdmd"))
    assert abs(float(paired[2]) - sum(b - a for a, b in zip(dmd, gdmd, strict=True)) / 2) < 6e-4
    teacher = read_scorecard(out / "teacher.json", prompts="shapes", count=12).rows[0]
    assert teacher.name == "teacher, 30 steps, guided"
    best = teacher.scores["shapes/overall"].mean
    assert abs(float(paired[1]) - sum(value - best for value in gdmd) / 2) < 6e-4
    start = [overall(path, "geneval") for path in sorted(out.rglob("cold_start/scores_1.json"))]
    assert f"| cold start: DMD, 1 updates, 4 steps | {sum(start) / len(start):.3f}" in report
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")} == checkpoints
    assert capsys.readouterr().out.endswith(report)


def test_results_continues_with_more_updates_in_a_moved_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--seeds=[0]", '--arms=["DMD"]', "--cold_start=1", "--count=6", FIT]
    main(["results", *short, "--updates=1"])
    (tmp_path / "runs" / "results").rename(tmp_path / "moved")
    main(["results", *short, "--updates=2", "--out=moved"])
    (checkpoint,) = (tmp_path / "moved" / "seed0" / "dmd" / "checkpoints").iterdir()
    assert checkpoint.name == "last.ckpt"
    assert read_checkpoint(str(checkpoint), in_memory=False)["global_step"] == 2
    path = tmp_path / "moved" / "seed0" / "dmd" / "scores_2.json"
    (before,) = read_scorecard(path, prompts="shapes", count=6).rows
    # Interrupted between training and scoring, it scores what was trained and still knows the training cost.
    path.unlink()
    main(["results", *short, "--updates=2", "--out=moved"])
    (after,) = read_scorecard(path, prompts="shapes", count=6).rows
    assert (after.scores, after.training) == (before.scores, before.training)


@pytest.fixture
def finished(tmp_path) -> dict[str, str]:
    """The options of a finished comparison in the default directory, scored on 1200 prompts."""
    scores = {f"{name}/overall": Interval(0.5, 0.4, 0.6) for name in ("geneval", "shapes", "hps_like")}
    row = Row("DMD", 4, 0.01, scores, TrainingCost(100, 1.0))
    for place, updates in (("cold_start", 1), ("dmd", 2)):
        run = tmp_path / "runs" / "results" / "seed0" / place
        write_scorecard(Scorecard("shapes", 1200, (row,)), run / f"scores_{updates}.json")
        (run / "cost_1.json").write_text("{}")  # as if interrupted before the shorter run was scored
        (run / "checkpoints").mkdir()
        torch.save({"state_dict": {}, "provenance": {"updates": updates}}, run / "checkpoints" / "last.ckpt")
    return {"--seeds": "[0]", "--arms": '["DMD"]', "--updates": "2", "--cold_start": "1"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("--updates=1", "last.ckpt: trained for 2 updates; 1 requested"),
        ("--cold_start=2", "start from a cold start of another length"),
        ("--count=12", "seed0/cold_start/scores_1.json: scored with count 1200; count 12 requested"),
    ],
)
def test_results_refuses_a_directory_of_another_comparison(finished, complaint, changed, expected):
    finished.update([changed.split("=")])
    line = complaint("results", *(f"{key}={value}" for key, value in finished.items()))
    assert expected in line
    assert "use another --out" in line
