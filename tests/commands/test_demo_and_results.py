"""The demo and the comparison over seeds, on the embedded pipeline, in a few updates."""

import json
import re

import pytest
import torch

from gdmd_lightning.cli import main
from gdmd_lightning.methods.checkpointing import read_checkpoint

CHEAP = ["--data.batch_size=8", "--data.group_size=4", "--model.matching.critic_updates=1"]
FIT = f"--fit={json.dumps([*CHEAP, '--trainer.enable_progress_bar=false'])}"


def test_demo_ends_with_a_table_and_a_pipeline_that_its_snippet_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["demo", "--cold_start=1", "--updates=2", "--count=12", FIT])
    said = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| ")][2:]
    assert [(row[0].strip(), int(row[1])) for row in rows] == [
        ("teacher, 30 steps, guided", 60),
        ("teacher, 4 steps, guided", 8),
        ("teacher, 4 steps", 4),
        ("DMD", 4),
        ("GDMD", 4),
    ]
    for place in ("pictures.png", "scores.json", "gdmd/checkpoints/last.ckpt", "gdmd/gradient_rewards"):
        assert (tmp_path / "runs" / "demo" / place).exists()
        assert place == "scores.json" or f"runs/demo/{place}" in said
    start = said.index("import diffusers")
    exec(said[start : said.index("\n\n", start)], {})
    assert (tmp_path / "picture.png").is_file()


def test_results_compare_arms_over_seeds_and_go_on_where_they_were_cut_off(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = ["--seeds=[0,1]", "--cold_start=1", "--updates=1", "--count=12"]
    arguments = ["results", *short, f"--fit={json.dumps(CHEAP)}"]
    main(arguments)
    report = (tmp_path / "runs" / "results" / "results.md").read_text()
    assert report in capsys.readouterr().out
    assert re.search(r"^\| DMD, 4 steps \| \d\.\d{3} ± \d", report, re.MULTILINE)
    paired = re.search(
        r"^\| GDMD, 4 steps (?:\|[^|]*){3}\| (-?\d\.\d{3}) ±[^|]*\| (-?\d\.\d{3}) ±", report, re.MULTILINE
    )
    scores = {
        (arm, seed): json.loads((tmp_path / "runs" / "results" / f"seed{seed}" / arm / "scores_1.json").read_text())
        for arm in ("dmd", "gdmd")
        for seed in (0, 1)
    }
    differences = [scores["gdmd", s]["shapes/overall"] - scores["dmd", s]["shapes/overall"] for s in (0, 1)]
    assert paired is not None
    assert abs(float(paired[2]) - sum(differences) / 2) < 6e-4
    teacher = json.loads((tmp_path / "runs" / "results" / "teacher.json").read_text())
    best = teacher["teacher, 30 steps, guided"]["shapes/overall"]
    assert abs(float(paired[1]) - sum(scores["gdmd", s]["shapes/overall"] - best for s in (0, 1)) / 2) < 6e-4
    start = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("cold_start/scores_1.json"))]
    mean = sum(score["geneval/overall"] for score in start) / len(start)
    assert f"| cold start: DMD, 1 updates, 4 steps | {mean:.3f}" in report
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    main(arguments)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")} == checkpoints
    assert capsys.readouterr().out.endswith(report)


def test_results_go_on_with_more_updates_where_their_directory_has_moved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["--seeds=[0]", '--arms=["DMD"]', "--cold_start=1", "--count=6", f"--fit={json.dumps(CHEAP)}"]
    main(["results", *short, "--updates=1"])
    (tmp_path / "runs" / "results").rename(tmp_path / "moved")
    main(["results", *short, "--updates=2", "--out=moved"])
    (checkpoint,) = (tmp_path / "moved" / "seed0" / "dmd" / "checkpoints").iterdir()
    assert checkpoint.name == "last.ckpt"
    assert read_checkpoint(str(checkpoint), in_memory=False)["global_step"] == 2
    scores = tmp_path / "moved" / "seed0" / "dmd" / "scores_2.json"
    found = scores.read_text()
    # Cut off between training and scoring, it scores what was trained and knows what that cost.
    scores.unlink()
    main(["results", *short, "--updates=2", "--out=moved"])
    assert scores.read_text() == found


@pytest.mark.parametrize(
    ("changed", "said"), [("--updates=1", "is 2 updates old, not 1"), ("--cold_start=2", "start from another")]
)
def test_results_do_not_mistake_a_longer_run_for_a_shorter(tmp_path, complaint, changed, said):
    given = {"--updates": "2", "--cold_start": "1"}
    for place, updates in (("cold_start", 1), ("dmd", 2)):
        run = tmp_path / "runs" / "results" / "seed0" / place
        (run / "checkpoints").mkdir(parents=True)
        (run / f"scores_{updates}.json").write_text("{}")
        (run / "cost_1.json").write_text("{}")  # as if cut off before the shorter run was scored
        torch.save({"state_dict": {}, "global_step": updates}, run / "checkpoints" / "last.ckpt")
    given.update([changed.split("=")])
    line = complaint("results", "--seeds=[0]", '--arms=["DMD"]', *(f"{k}={v}" for k, v in given.items()))
    assert said in line
    assert "use another --out" in line
