"""Loading a checkpoint runs only trusted classes, downloads nothing, and reports malformed content in one line."""

import copy
import shutil
import sys

import pytest
import tiny
import torch
import yaml
from jsonargparse import _common

from gdmd_lightning.cli import main
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.configuration.trust import only_classes_of
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.studies.export import export

SPY = "from pathlib import Path\nPath('ran').touch()\n\nclass Family:\n    pass\n"


@pytest.fixture(scope="module")
def content(recorded_run):
    return read_checkpoint(str(recorded_run / "checkpoints" / "last.ckpt"))


@pytest.fixture
def forged(content, tmp_path):
    """``forged(change)`` writes the recorded checkpoint after ``change(init_args of its model, provenance)``."""

    def write(change):
        provenance = copy.deepcopy(content["provenance"])
        configuration = yaml.safe_load(provenance["configuration"])
        change(configuration["model"]["init_args"], provenance)
        if "configuration" in provenance and provenance["configuration"] == content["provenance"]["configuration"]:
            provenance["configuration"] = yaml.safe_dump(configuration)
        path = tmp_path / "forged.ckpt"
        torch.save({**content, "provenance": provenance}, path)
        return str(path)

    return write


@pytest.fixture
def spy(tmp_path, monkeypatch):
    """A module in the working directory that leaves a trace when it is imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "spy.py").write_text(SPY)
    yield tmp_path / "ran"
    sys.modules.pop("spy", None)


def as_class_path(settings, provenance):
    settings["family"]["class_path"] = "spy.Family"


def as_name(settings, provenance):
    settings["family"] = "spy.Family"


def as_default_of_another_setting(settings, provenance):
    settings["sampler"] = {"class_path": "spy.Family"}


@pytest.mark.parametrize("place", [as_class_path, as_name, as_default_of_another_setting])
def test_checkpoint_cannot_import_a_module_that_nobody_trusts(forged, spy, place):
    path = forged(place)
    with pytest.raises(UserError) as refused:
        load_module(path, role="ema")
    assert not spy.exists()
    assert "spy.Family" in str(refused.value)
    if place is not as_name:
        assert "--trust spy.Family" in str(refused.value)


def test_trusted_module_may_run(forged, spy):
    path = forged(as_class_path)
    with pytest.raises(UserError) as refused:
        load_module(path, role="ema", trust=["spy"])
    assert spy.exists()
    assert "would run its module" not in str(refused.value)


def test_reward_of_a_user_needs_trust_only_if_it_is_restored(recorded_run):
    path = str(recorded_run / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"names the class 'tiny\.Brightness'.*--trust tiny\.Brightness"):
        load_module(path)
    assert type(load_module(path, trust=["tiny.Brightness"]).judge.reward) is tiny.Brightness


def test_trust_ends_with_the_loading():
    before = copy.deepcopy(_common.parsing_settings)
    with only_classes_of(["tiny"]):
        assert _common.parsing_settings["import_paths_enforced"]
    assert _common.parsing_settings == before
    with pytest.raises(UserError, match="--trust"), only_classes_of(["not a name"]):
        pass


def test_export_and_sample_need_neither_the_reward_nor_its_module(forged, tmp_path, capsys):
    def absent(settings, provenance):
        settings["reward"] = {"class_path": "gone.Reward", "init_args": {"path": "gone/weights"}}

    path = forged(absent)
    main(["sample", path, "shapes", str(tmp_path / "pictures"), "--count=1"])
    assert (tmp_path / "pictures" / "000000-0.png").is_file()
    main(["export", path, str(tmp_path / "out")])
    assert "| Reward | brightness |" in (tmp_path / "out" / "README.md").read_text()


def elsewhere(path):
    def change(settings, provenance):
        settings["family"]["init_args"]["path"] = path

    return change


@pytest.mark.parametrize("path", ["/gone/teacher", "gone/teacher", "organization/teacher"])
def test_teacher_that_is_not_here_is_one_line_and_never_fetched(complaint, forged, path, monkeypatch):
    from diffusers import StableDiffusion3Pipeline

    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", lambda *a, **k: pytest.fail("fetched"))
    checkpoint = forged(elsewhere(path))
    for command in (["export", checkpoint, "out"], ["evaluate", f"--checkpoint=a={checkpoint}"]):
        line = complaint(*command)
        assert line.startswith(f"family.path: {path!r}, named by the checkpoint, does not exist here; ")
        assert "--teacher PATH" in line


def test_teacher_option_says_where_the_teacher_is(forged, tiny_pipeline, tmp_path):
    moved = shutil.copytree(tiny_pipeline, tmp_path / "moved")
    module = load_module(forged(elsewhere("gone/teacher")), role="ema", teacher=str(moved))
    assert module.family.path == str(moved)


def test_teacher_option_with_another_teacher_is_refused(complaint, recorded_run, tmp_path):
    other = tiny.save_pipeline(tmp_path / "other", seed=1)
    line = complaint("export", recorded_run / "checkpoints" / "last.ckpt", "out", f"--teacher={other}")
    assert "it was trained with another teacher" in line
    assert not (tmp_path / "out").exists()


DEEP = "model: " + "[" * 3000 + "]" * 3000
MALFORMED = {
    "no provenance": (None, "provenance: there is none"),
    "a list": ([], "provenance: it is list"),
    "unknown field": ({"invented": 1}, "provenance 'invented': unknown field"),
    "wrong type": ({"updates": "3"}, "provenance 'updates': it is str, not int"),
    "true": ({"updates": True}, "provenance 'updates': it is bool, not int"),
    "negative": ({"updates": -1}, "provenance 'updates': it is -1"),
    "scores": ({"scores": {"a": "b"}}, "provenance 'scores': not all of them are numbers by name"),
    "no configuration": ({"configuration": ""}, "has no configuration"),
    "no YAML": ({"configuration": "model: ["}, "cannot parse the configuration"),
    "deep YAML": ({"configuration": DEEP}, "cannot parse the configuration"),
    "long number": ({"configuration": f"model: {'9' * 5000}"}, "cannot parse the configuration"),
    "long float": ({"configuration": f"model: {{class_path: DMD, init_args: {{steps: {'9' * 400}.0}}}}"}, "steps"),
    "another mapping": ({"configuration": "models: 1"}, "has no model"),
    "text": ({"configuration": "model"}, "has no model"),
    "an environment variable": ({"configuration": "model: {init_args: {a: '${oc.env:UNSET_HERE}'}}"}, "UNSET_HERE"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_provenance_is_one_line(content, complaint, tmp_path, name):
    fields, expected = MALFORMED[name]
    provenance = {**content["provenance"], **fields} if isinstance(fields, dict) else fields
    torch.save({**content, "provenance": provenance}, tmp_path / "bad.ckpt")
    assert expected in complaint("export", tmp_path / "bad.ckpt", "out")


WRONG = {
    "state_dict": ([], {"a": 1}, {1: torch.zeros(1)}, "text", None),
    "optimizer_states": ({}, 3),
    "loops": ([],),
    "epoch": ("1", True, torch.zeros(1)),
    "pytorch-lightning_version": (2,),
}


def test_malformed_parts_are_one_line_that_names_them(content, tmp_path):
    path = str(tmp_path / "bad.ckpt")
    for part, values in WRONG.items():
        for value in values:
            torch.save({**content, part: value}, path)
            with pytest.raises(UserError, match=rf"checkpoint: the {part} in '.*bad.ckpt' (is|has) "):
                read_checkpoint(path, in_memory=False)


def test_export_of_a_restored_module_is_that_of_the_trained_one(recorded_run, tmp_path):
    module = load_module(str(recorded_run / "checkpoints" / "last.ckpt"), role="ema")
    with pytest.raises(UserError, match="restored without its reward"):
        module.judge.reward.score(torch.zeros(1, 3, 8, 8), [])
    assert export(module, tmp_path / "out").is_dir()
