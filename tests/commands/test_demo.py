"""The demo on the embedded pipeline, in a few updates."""

import json

import pytest

from gdmd_lightning.cli import main

CHEAP = ["--data.batch_size=8", "--data.group_size=4", "--model.matching.fake_score_updates=1"]


@pytest.mark.parametrize("teacher", ["tiny", pytest.param("of Shapes", marks=pytest.mark.slow)])
def test_demo_prints_a_table_and_a_snippet_that_loads_its_pipeline(
    tmp_path, monkeypatch, capsys, tiny_pipeline, teacher
):
    monkeypatch.chdir(tmp_path)
    fit = [*CHEAP, "--trainer.enable_progress_bar=false"]
    if teacher == "tiny":
        fit += [f"--model.family.path={tiny_pipeline}"]
    main(["demo", "--cold_start=1", "--updates=2", "--count=12", f"--fit={json.dumps(fit)}"])
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")][2:]
    assert [(row[0].strip(), int(row[1])) for row in rows] == [
        ("teacher, 30 steps, guided", 60),
        ("teacher, 4 steps, guided", 8),
        ("teacher, 4 steps", 4),
        ("DMD", 4),
        ("GDMD", 4),
    ]
    for place in ("pictures.png", "scores.json", "gdmd/checkpoints/last.ckpt", "gdmd/gradient_rewards"):
        assert (tmp_path / "runs" / "demo" / place).exists()
        assert place == "scores.json" or f"runs/demo/{place}" in printed
    start = printed.index("import diffusers")
    exec(printed[start : printed.index("\n\n", start)], {})
    assert (tmp_path / "picture.png").is_file()
