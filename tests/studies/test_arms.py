"""Arms of a comparison as arguments of ``fit``, and the shipped comparisons."""

import pytest
import yaml

from gdmd_lightning.configuration.training import parse
from gdmd_lightning.locations import find_config
from gdmd_lightning.studies.arms import Arm, option


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
