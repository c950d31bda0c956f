"""Arms of a comparison as arguments of ``fit``, and the shipped comparisons."""

import json
import sys
from dataclasses import replace

import pytest
import torch
import yaml

from gdmd_lightning.configuration.restore import build_module, describe_module
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import find_config
from gdmd_lightning.studies import arms
from gdmd_lightning.studies.arms import Arm, Run, option, run_arm
from gdmd_lightning.studies.tasks import TASKS
from gdmd_lightning.studies.watch import Watch


@pytest.mark.parametrize(
    ("value", "argument"),
    [(5, "--a.b=5"), (False, "--a.b=false"), ("state", "--a.b=state"), ([{"c": None}], '--a.b=[{"c": null}]')],
)
def test_option_is_an_argument_of_fit(value, argument):
    assert option("a.b", value) == argument


def test_arm_arguments_name_configs_first():
    arm = Arm(["one.yaml", "two.yaml"], {"model.lambda_policy": 5})
    assert arm.arguments == ["--config", "one.yaml", "--config", "two.yaml", "--model.lambda_policy=5"]


@pytest.mark.parametrize(
    "config",
    [
        "compare_shapes.yaml",
        *(pytest.param(f"compare_{n}.yaml", marks=pytest.mark.slow) for n in ("methods", "switches")),
    ],
)
def test_methods_of_a_shipped_comparison_all_parse_to_different_models(config):
    with open(find_config(config), encoding="utf-8") as file:
        methods = yaml.safe_load(file)["methods"]
    models = [parse(Arm(**method).arguments).model for method in methods.values()]
    assert all(one != other for i, one in enumerate(models) for other in models[:i])


def test_settings_of_a_run_are_plain_values_without_place_seed_budget_and_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_OF_PROMPTS", "a-private-source")
    (tmp_path / "mine.yaml").write_text("data: {source: '${oc.env:SOURCE_OF_PROMPTS}'}\ntrainer: {max_steps: 7}\n")
    arm = Arm(["shapes.yaml", str(tmp_path / "mine.yaml")], {"model.start_from": "a.ckpt"})
    run = Run("GDMD", arm, tmp_path / "run", 5, extra=("--data.batch_size=8", "--seed_everything=3"))
    settings = run.settings(Watch(per_task=1, samples=2))
    assert settings["model.class_path"] == "gdmd_lightning.methods.gdmd.GDMD"
    assert (settings["model.lambda_policy"], settings["data.batch_size"], settings["watch.samples"]) == (2.0, 8, 2)
    assert settings["data.source"] == "${oc.env:SOURCE_OF_PROMPTS}"
    assert settings["model.start_from"] == "a.ckpt"
    later = replace(run, directory=tmp_path / "moved", seed=6, start_from=tmp_path / "start.ckpt")
    assert later.settings(Watch(1, 2)) == {k: v for k, v in settings.items() if k != "model.start_from"}
    chosen = ("trainer.max_steps", "trainer.callbacks", "trainer.logger", "seed_everything", "ckpt_path")
    assert [key for key in settings if key.startswith(chosen)] == []
    assert json.loads(json.dumps(settings)) == settings


def test_a_run_loads_a_class_of_the_user_s_own_only_if_its_arm_names_it(tmp_path, tiny_pipeline, monkeypatch):
    (tmp_path / "own_methods.py").write_text(
        "from gdmd_lightning.methods.dmd import DMD\n\n\nclass Mine(DMD):\n    pass\n\n\nclass Other(DMD):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    family = {"model.family.path": str(tiny_pipeline)}

    def run(name):
        arm = Arm(["shapes.yaml", "shapes_dmd.yaml"], {"model": f"own_methods.{name}", **family})
        return Run(name, arm, tmp_path / "run", 0)

    mine = run("Mine")
    settings = parse(mine.arguments).model
    module = build_module(settings)
    module.configure_model()
    mine.checkpoint.parent.mkdir(parents=True)
    content = {"state_dict": module.state_dict(), "provenance": {"configuration": describe_module(settings)}}
    torch.save(content, mine.checkpoint)
    assert type(mine.module()).__name__ == "Mine"
    with pytest.raises(UserError, match=r"names the class 'own_methods\.Mine', which is not part of gdmd_lightning"):
        run("Other").module()
    sys.modules.pop("own_methods")


def test_only_the_budget_ends_a_training(tmp_path, monkeypatch):
    """A method's configuration need not say ``max_epochs: -1``, and an epoch that it sets does not end it earlier."""

    def train(directory, arguments):
        limits = parse(arguments).trainer
        raise UserError(f"{limits.max_steps} updates, {limits.max_epochs} epochs")

    monkeypatch.setattr(arms, "train", train)
    run = Run("DMD", Arm(["shapes.yaml"], {"trainer.max_epochs": 2}), tmp_path, 0)
    with pytest.raises(UserError, match=r"^DMD: -1 updates, -1 epochs$"):
        run_arm(run, [40], TASKS["shapes"], 6, Watch())


@pytest.mark.parametrize(("where", "expected"), [("data", "DMD, small: data: no"), ("", "DMD, small: no")])
def test_errors_of_a_training_name_the_arm(tmp_path, monkeypatch, where, expected):
    def train(run, budget, seconds):
        raise UserError("no", where=where)

    monkeypatch.setattr(arms, "_train", train)
    run = Run("DMD, small", Arm(["shapes.yaml"]), tmp_path, 0)
    with pytest.raises(UserError, match=f"^{expected}$"):
        run_arm(run, [40], TASKS["shapes"], 6, Watch())
