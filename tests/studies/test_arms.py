"""Arms of a comparison as arguments of ``fit``, and the shipped comparisons."""

import json
from dataclasses import replace

import pytest
import yaml

from gdmd_lightning.configuration.training import parse
from gdmd_lightning.locations import find_config
from gdmd_lightning.studies.arms import Arm, Run, option
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
