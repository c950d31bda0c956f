"""The command that scores."""

import json

from gdmd_lightning.cli import main


def test_evaluate_scores_checkpoints_by_name_and_the_teacher(recorded_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = recorded_run / "checkpoints" / "last.ckpt"
    given = [f"--checkpoint=one={last}", "--checkpoint", f"two={last}"]
    main(["evaluate", *given, "--count=6", "--teacher_steps=2", "--out=scores"])
    card = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert (card["prompts"], card["count"]) == ("shapes", 6)
    rows = card["rows"]
    assert [row["evaluations"] for row in rows] == [4, 8, 4, 4, 4]
    assert [row["name"] for row in rows[3:]] == ["one", "two"]
    assert rows[3]["scores"] == rows[4]["scores"]  # the same checkpoint from the same noise
    assert "| two" in capsys.readouterr().out
    assert (tmp_path / "scores" / "pictures.png").is_file()


def test_evaluate_reports_a_checkpoint_without_a_name(complaint):
    assert complaint("evaluate", "--checkpoint=last.ckpt").startswith("--checkpoint: 'last.ckpt' is not NAME=PATH; ")
