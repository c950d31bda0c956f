"""The command that scores."""

import json

import torch

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


def resized(checkpoint, path, height):
    content = torch.load(checkpoint, weights_only=True)
    yaml = content["provenance"]["configuration"]
    assert "height: 32" in yaml
    content["provenance"]["configuration"] = yaml.replace("height: 32", f"height: {height}")
    torch.save(content, path)
    return path


def test_evaluate_refuses_a_checkpoint_whose_pictures_its_scores_cannot_read(complaint, recorded_run, tmp_path):
    last = recorded_run / "checkpoints" / "last.ckpt"
    large = resized(last, tmp_path / "large.ckpt", 1024)
    line = complaint("evaluate", f"--checkpoint=one={last}", f"--checkpoint=two={large}", "--count=6")
    large.unlink()
    start = f"{large}: it makes pictures of 1024x32, and the scores of 'shapes' read only 32x32; "
    assert line == f"{start}score it while it trains, with the callback GenerationEvaluation and your own scores"


def test_evaluate_refuses_prompts_that_its_scores_cannot_judge_before_loading(complaint, tmp_path):
    (tmp_path / "p.txt").write_text("a red circle\n")
    line = complaint("evaluate", "--checkpoint=one=no.ckpt", "--prompts=p.txt", "--count=1")
    assert line.startswith("score 'geneval': prompt 'a red circle' has no GenEval metadata; ")
