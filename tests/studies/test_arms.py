"""Arms of a comparison as arguments of ``fit``."""

import pytest

from gdmd_lightning.configuration.training import parse
from gdmd_lightning.errors import UserError
from gdmd_lightning.studies.arms import ARMS, Arm, option
from gdmd_lightning.studies.comparison import named_arms


@pytest.mark.parametrize(
    ("value", "argument"),
    [(5, "--a.b=5"), (False, "--a.b=false"), ("state", "--a.b=state"), ([{"c": None}], '--a.b=[{"c": null}]')],
)
def test_option_is_an_argument_of_fit(value, argument):
    assert option("a.b", value) == argument


def test_arm_arguments_name_configs_first():
    arm = Arm("other", ("one.yaml", "two.yaml"), {"model.lambda_policy": 5})
    assert arm.arguments == ["--config", "one.yaml", "--config", "two.yaml", "--model.lambda_policy=5"]


def test_arms_all_parse_to_different_models():
    models = [parse(arm.arguments).model for arm in ARMS.values()]
    assert all(one != other for i, one in enumerate(models) for other in models[:i])


def test_named_arms_reports_an_unknown_arm():
    with pytest.raises(UserError, match="--arms: unknown arm 'GDDM'; use: DMD; DMD, all levels; "):
        named_arms(["DMD", "GDDM"])
