"""The command that scores: what README shows of it."""

import json

from gdmd_lightning.cli import main


def test_checkpoints_are_scored_beside_the_teacher_by_their_names(recorded_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = recorded_run / "checkpoints" / "last.ckpt"
    given = [f"--checkpoint=one={last}", "--checkpoint", f"two={last}"]
    main(["evaluate", *given, "--count=6", "--teacher_steps=2", "--out=scores"])
    rows = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert [row["nfe"] for row in rows] == [4, 8, 4, 4, 4]
    assert [row["name"] for row in rows[3:]] == ["one", "two"]
    # The same checkpoint from the same noise.
    assert {k: v for k, v in rows[3].items() if "/" in k} == {k: v for k, v in rows[4].items() if "/" in k}
    assert "| two" in capsys.readouterr().out
    assert (tmp_path / "scores" / "pictures.png").is_file()
