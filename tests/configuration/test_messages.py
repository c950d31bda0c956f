# ruff: noqa: E501  (tables: one case per line)
"""A wrong argument gets one line: what is wrong, where, and what was probably meant."""

import sys
from pathlib import Path

import pytest
import yaml

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.configs import SECTIONS, fit_arguments
from gdmd_lightning.configuration.messages import shortened
from gdmd_lightning.configuration.suggestions import did_you_mean, instead_of_key, nearest
from gdmd_lightning.errors import UserError

OWN = {
    "talk_good": "from gdmd_lightning.rewards.base import Reward\n\nclass Mine(Reward):\n    def __init__(self, gain: float = 1): ...\n"
    "    def score(self, images, prompts): ...\n",
    "talk_inner": "import nowhere_to_be_found\n",
    "talk_raises": "raise ValueError('boom')\n",
    "talk_syntax": "class Mine(:\n",
}


@pytest.fixture(autouse=True)
def own_modules(tmp_path, monkeypatch):
    """Modules of a user, of which only one is right."""
    for name, code in OWN.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in OWN:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def fit():
    """The command line of ``fit``; building its parsers takes longer than parsing."""
    return training.parsing_cli(["--config", "shapes.yaml"])


def refusal(fit, *arguments: str) -> str:
    with pytest.raises(UserError) as refused:
        fit.parse_arguments(fit.parser, ["fit", *fit_arguments(["--config", "shapes.yaml", *arguments])])
    return str(refused.value)


SEE = "see fit --model.help GDMD"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        # Keys.
        ("--model.lambda_polcy 2", f"fit: unknown key 'model.lambda_polcy'; did you mean 'model.lambda_policy'? {SEE}"),
        ("--model.init_args.lambda_polcy 2", "fit: unknown key 'model.lambda_polcy'; did you mean 'model.lambda_policy'?"),
        ("--model.generator.name x", "'model.generator' has learning_rate, betas, "),
        ("--model.lora.rnk 4", "fit: unknown key 'model.lora.rnk'; did you mean 'model.lora.rank'? "),
        ("--model.sampler ODE --model.sampler.churn 4", "unknown key 'model.sampler.churn'; ODE has no settings; "),
        ("--trainer.callbacks+=GradientRewardRecord --trainer.callbacks.flush 3", "GradientRewardRecord has flush_every, "),
        # No abbreviations, on any level.
        ("--trainer.max_step 4", "fit: unknown option '--trainer.max_step'; did you mean 'trainer.max_steps'? "),
        ("--data.batch_siz 4", "fit: unknown option '--data.batch_siz'; did you mean 'data.batch_size'? "),
        ("--model.matching.fake_score_update 2", "did you mean 'model.matching.fake_score_updates'?"),
        # Classes and groups of settings.
        ("--model GDMDD", "model: unknown class 'GDMDD'; did you mean 'GDMD'? "),
        ("--model.reward ShapesRewrd", "model.reward: unknown class 'ShapesRewrd'; did you mean 'ShapesReward'? "),
        ("--trainer.logger TensorBoardLoger", "trainer.logger: unknown class 'TensorBoardLoger'; did you mean 'TensorBoardLogger'?"),
        ("--trainer.callbacks+=GenerationEvalution", "did you mean 'GenerationEvaluation'? see fit --help"),
        (
            "--model.sampler 4",
            "model.sampler: expected the name of a Sampler class: CPS, ODE, Renoise, SDE, got '4'; "
            f"e.g. --model.sampler CPS; {SEE}",
        ),
        ("--model.lora 4", "model.lora: expected settings (rank, alpha, targets, start), got '4'; e.g. --model.lora.rank 32; "),
        ("--model.policy full", "model.policy: expected settings (form, at, normalize, beta, old_decay), got 'full'; "),
        ("--model.reward torch.nn.Linear", "'torch.nn.Linear' is not a Reward; use a subclass of it: AestheticScore, "),
        # Values.
        ("--model.policy.form wieghted", "expected one of 'full', 'weighted', got 'wieghted'; did you mean 'weighted'? "),
        # Modules of a user.
        (
            "--model.reward nothing.Mine",
            "model.reward: there is no module 'nothing' for 'nothing.Mine'; a class of your own is found in the "
            "working directory and on PYTHONPATH",
        ),
        ("--model.reward talk_inner.Mine", "module 'talk_inner' cannot be imported: ModuleNotFoundError: No module named 'nowhere"),
        ("--model.reward talk_raises.Mine", "model.reward: module 'talk_raises' cannot be imported: ValueError: boom; "),
        ("--model.reward talk_syntax.Mine", "talk_syntax.py, line 1, is not Python: invalid syntax; "),
        ("--model.reward talk_good.Mein", "model.reward: module 'talk_good' has no class 'Mein'; did you mean 'Mine'? "),
        ("--model.reward talk_good.Mine --model.reward.gian 2", "unknown key 'model.reward.gian'; did you mean 'model.reward.gain'?"),
    ],
)  # fmt: skip
def test_wrong_argument_is_explained(fit, arguments, expected):
    line = refusal(fit, *arguments.split())
    assert expected in line
    assert "\n" not in line
    assert len(line) < 500


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("modle: {}", "wrong.yaml: unknown key 'modle'; did you mean 'model'?"),
        ("model: {init_args: {matching: {fake_score_update: 3}}}", "fit: unknown key 'model.matching.fake_score_update'; "
         f"did you mean 'model.matching.fake_score_updates'? {SEE}"),
        ("trainer: {callbacks: [{class_path: GradientRewardRecrd}]}", "unknown class 'GradientRewardRecrd'; did you mean "),
        ("model: {init_args: {reward: {class_path: talk_inner.Mine}}}", "module 'talk_inner' cannot be imported"),
        ("model: {init_args: {height: '${model.hieght}'}}", "model.height: '${model.hieght}' refers to a key that is not there; "),
        ("model: {init_args: {height: '${oc.nothing:x}'}}", "model.height: Unsupported interpolation type oc.nothing; "),
    ],
)  # fmt: skip
def test_wrong_configuration_is_explained(fit, content, expected):
    Path("wrong.yaml").write_text(content)
    line = refusal(fit, "--config", "wrong.yaml")
    assert expected in line
    assert "\n" not in line
    assert len(line) < 500


def test_error_points_to_the_command_that_was_given():
    with pytest.raises(UserError, match=r"; see plan --model.help GDMD$"):
        training.parse(["--config", "shapes.yaml", "--model.steps", "few"], "plan")


def test_sections_are_those_of_the_parser(fit):
    assert set(fit.config.fit.as_dict()) == set(SECTIONS)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("--trainr.max_steps=3", "plan: unknown option '--trainr.max_steps'; did you mean '--trainer'? see plan --help"),
        ("--lambda_policy", "unknown option '--lambda_policy'; options start with --config, --seed_everything, --trainer, "),
        ("--conf", "unknown option '--conf'; did you mean '--config'? "),
    ],
)  # fmt: skip
def test_unknown_option_is_refused_before_imports(argument, expected):
    with pytest.raises(UserError) as refused:
        fit_arguments([argument, "3"], "plan")
    assert expected in str(refused.value)


def test_nearest_ignores_case_and_refuses_what_is_unlike():
    assert nearest("oed", ["ODE", "SDE"]) == "ODE"
    assert nearest("4", ["ODE", "SDE"]) is None
    assert did_you_mean("x", ["b", "a"]) == "use one of: a, b"


def test_key_of_the_same_group_is_suggested_first():
    valid = {"policy.form": None, "lora.from": None, "matching.floor": None}
    assert instead_of_key("policy.from", valid) == "did you mean 'policy.form'?"
    assert instead_of_key("floor", valid, "model.") == "did you mean 'model.matching.floor'?"
    assert instead_of_key("matchin.flor", valid) == "did you mean 'matching.floor'?"
    assert instead_of_key("policy.wholly_else", valid) == "'policy' has form"


def test_long_text_is_cut_between_words():
    assert shortened("word " * 100) == " ".join(["word"] * 60) + " ..."
    assert shortened("one\n two.") == "one two"


def test_yaml_of_a_printed_configuration_has_only_known_sections(tmp_path):
    Path("copy.yaml").write_text(yaml.safe_dump({"seed_everything": 1, "ckpt_path": None}))
    assert fit_arguments(["--config=copy.yaml"]) == ["--config=copy.yaml"]
