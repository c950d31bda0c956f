"""Values from the environment are written as references, and found again when a checkpoint is loaded."""

import pytest
import tiny
import yaml

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.references import (
    environment_references,
    resolved,
    with_environment,
    with_references,
)
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint

SECRET = "hf_a_token_of_mine"


class WithToken(tiny.Brightness):
    """The reward of a service."""

    def __init__(self, token: str) -> None:
        self.token = token


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    monkeypatch.setenv("PLACE", "/data")


@pytest.mark.parametrize("form", ["--model.x=${oc.env:TOKEN}", "${oc.env:TOKEN}", "${oc.env:TOKEN,none}", "file"])
def test_secret_is_replaced_wherever_it_stands(tmp_path, form):
    if form == "file":
        (tmp_path / "mine.yaml").write_text("model: {x: [{y: '${oc.env:TOKEN}'}]}\n")
        form = f"--config={tmp_path / 'mine.yaml'}"
    text = yaml.safe_dump({"key": SECRET, "url": f"https://{SECRET}@host", "list": [{"deep": SECRET}], "n": 3})
    masked = with_references(f"# header\n{text}", environment_references([form]))
    assert SECRET not in masked
    assert masked.startswith("# header\n")
    found = yaml.safe_load(masked)
    assert found["n"] == 3
    assert resolved(found, "a.ckpt") == yaml.safe_load(text)


def test_short_values_are_replaced_only_as_they_were_given():
    references = environment_references(["--model.path=${oc.env:PLACE}/teacher"])
    masked = yaml.safe_load(with_references(yaml.safe_dump({"a": "/data/teacher", "b": "/data/other"}), references))
    assert masked == {"a": "${oc.env:PLACE}/teacher", "b": "/data/other"}


def test_numbers_are_written_as_values(monkeypatch):
    monkeypatch.setenv("SCALE", "2.5")
    text = yaml.safe_dump({"guidance_scale": 2.5, "margin": 2.5, "name": "2.5"})
    masked = yaml.safe_load(with_references(text, environment_references(["--model.guidance_scale=${oc.env:SCALE}"])))
    assert masked == {"guidance_scale": 2.5, "margin": 2.5, "name": "${oc.env:SCALE}"}


def test_configuration_without_references_is_unchanged():
    assert environment_references(["--model.steps=3", "plain"]) == {}
    assert with_references("# a comment\nb:   1\n", {}) == "# a comment\nb:   1\n"


def test_unset_variable_is_one_line():
    with pytest.raises(UserError, match="NOT_SET_HERE"):
        resolved({"a": "${oc.env:NOT_SET_HERE}"}, "a.ckpt")


@pytest.mark.parametrize("form", [["--data.source=${oc.env:MINE}"], ["--data.source", "${oc.env:MINE}"]])
def test_variables_in_arguments_are_resolved_and_written_as_references(fast_fit, monkeypatch, form):
    monkeypatch.setenv("MINE", "geneval")
    cli = training.parsing_cli([*fast_fit, *form])
    assert cli.config.fit.data.source == "geneval"
    assert environment_references(cli._arguments)["geneval"] == "${oc.env:MINE}"


def test_an_argument_may_refer_to_other_keys_and_a_variable():
    assert with_environment("--a=${oc.env:PLACE}/${model.steps}") == "--a=${oc.env:PLACE}/${model.steps}"
    assert with_environment("--a=x,${oc.env:PLACE},${oc.env:NOT_SET_HERE,4}") == "--a=x,/data,4"


@pytest.mark.parametrize("place", ["argument", "file"])
def test_a_variable_of_a_run_that_is_not_set_is_named(fast_fit, tmp_path, place):
    (tmp_path / "mine.yaml").write_text("data: {source: '${oc.env:NOT_SET_HERE}'}\n")
    given = "--data.source=${oc.env:NOT_SET_HERE}" if place == "argument" else f"--config={tmp_path / 'mine.yaml'}"
    said = r"data\.source: the environment variable NOT_SET_HERE is not set; set it, or write \$\{oc\.env:NOT_SET_HERE,"
    with pytest.raises(UserError, match=said):
        training.parse([*fast_fit, given])


def test_run_writes_no_secret_and_its_checkpoint_can_be_used(fast_fit, tmp_path, monkeypatch, tiny_pipeline):
    monkeypatch.setenv("TEACHER", str(tiny_pipeline))
    init = {
        "family": {"class_path": "SD3Family", "init_args": {"path": "${oc.env:TEACHER}", "max_sequence_length": 0}},
        "reward": {"class_path": f"{__name__}.WithToken", "init_args": {"token": "${oc.env:TOKEN}"}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"init_args": init}}))
    cli = training.run([*fast_fit, "--config", str(tmp_path / "mine.yaml"), "--trainer.max_steps=1"])
    assert cli.model.judge.reward.token == SECRET
    run = tmp_path / "run"
    written = [p for p in run.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert written == []
    assert "token: ${oc.env:TOKEN}" in (run / "config.yaml").read_text()
    last = run / "checkpoints" / "last.ckpt"
    assert "path: ${oc.env:TEACHER}" in read_checkpoint(str(last))["provenance"]["configuration"]
    monkeypatch.delenv("TOKEN")
    assert load_module(str(last), role="ema").family.path == str(tiny_pipeline)
