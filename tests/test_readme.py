"""The README's commands, in order, in a fresh directory."""

import json
import re
import shlex
from contextlib import nullcontext
from pathlib import Path

import pytest

from gdmd_lightning.cli import main
from gdmd_lightning.methods.checkpointing import read_checkpoint

README = Path(__file__).parents[1] / "README.md"
# What makes a training and an evaluation short; everything else runs as written.
SHORT = {
    "fit": ["--data.batch_size=8", "--data.group_size=4", "--model.matching.fake_score_updates=1"],
    "evaluate": ["--count=6", "--teacher_steps=2"],
}
FEWER = {"50": "2", "400": "4"}


def commands(heading: str) -> list[str]:
    """The lines of the first block of commands under a heading."""
    text = README.read_text(encoding="utf-8")
    return re.findall(r"```\n(.*?)```", text[text.index(f"## {heading}\n") :], re.DOTALL)[0].splitlines()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_of_a_run_end_with_its_pictures_scores_and_pipeline(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran = []
    for line in commands("Your own run"):
        words = shlex.split(line, comments=True)
        if words[:3] != ["python", "-m", "gdmd_lightning"]:
            if words[0] == "printf":
                Path(words[-1]).write_text(words[1].replace("\\n", "\n"))
            else:
                assert words == ["source", ".venv/bin/activate"]
            continue
        command, *arguments = words[3:]
        arguments = [FEWER.get(word, word) for word in arguments]
        answers = {"--print_config", "--model.help"} & set(arguments)
        with pytest.raises(SystemExit) if answers else nullcontext() as stop:
            main([command, *arguments, *([] if answers else SHORT.get(command, []))])
        assert not answers or stop.value.code in (0, None), line
        ran.append(command)
    assert ran == ["fit", "fit", "fit", "fit", "evaluate", "sample", "export"]
    run = tmp_path / "runs" / "shapes" / "version_0"
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert read_checkpoint(str(run / "checkpoints" / "last.ckpt"))["global_step"] == 4
    assert (run / "pictures" / "000004.png").is_file()
    printed = capsys.readouterr().out
    assert "score shapes/overall: 0." in printed
    scores = json.loads((tmp_path / "runs" / "evaluation" / "scores.json").read_text())
    assert "mine" in [row["name"] for row in scores["rows"]]
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert (tmp_path / "my_pipeline" / "model_index.json").is_file()


def test_lines_for_a_published_teacher_are_complete_arguments(monkeypatch, tmp_path):
    """They need published weights, so they are only parsed."""
    from gdmd_lightning.configuration.training import parse

    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    block = re.search(r"For a published teacher.*?```\n(.*?)```", text, re.DOTALL)[1]
    lines = [shlex.split(line, comments=True)[3:] for line in block.splitlines()]
    assert [words[0] for words in lines] == ["plan", "fit", "fit", "export"]
    for command, *arguments in lines[:3]:
        models = parse(arguments).model
        assert models.class_path.rsplit(".", 1)[-1] == ("DMD" if "cold_start.yaml" in arguments else "GDMD"), command
