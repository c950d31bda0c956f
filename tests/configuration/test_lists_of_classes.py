"""A list of callbacks replaces an earlier one whole: no item gets settings of the item that stood in its place."""

import json

import pytest
import yaml

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.configs import fit_arguments

KEEPER = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "loss", "filename": "x" * 300}}
MINE = [
    KEEPER,
    {"class_path": "GradientRewardRecord"},
    {"class_path": "GenerationEvaluation", "init_args": {"scores": []}},
]
TEXT = json.dumps(MINE)
"""As many callbacks as those of ``shapes.yaml``, of the same classes; longer than the name of a file can be."""


@pytest.fixture(scope="module")
def fit():
    return training.parsing_cli(["--config", "shapes.yaml"])


def parsed(fit, *arguments):
    """``trainer`` of these arguments after ``--config shapes.yaml``; all callbacks with all their settings."""
    fit.parse_arguments(fit.parser, ["fit", *fit_arguments(["--config", "shapes.yaml", *arguments])])
    return fit.config.fit.trainer


@pytest.mark.parametrize(
    "arguments",
    [
        [f"--trainer.callbacks={TEXT}"],
        ["--trainer.callbacks", TEXT],
        ["--trainer.callbacks=list.yaml"],
        [f'--trainer={{"callbacks": {TEXT}}}'],
        ["--config", "mine.yaml"],
        ["--config=mine.yaml"],
        ["-c", "mine.yaml"],
    ],
)
def test_a_later_list_replaces_the_earlier_one_whole(fit, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": MINE}}))
    (tmp_path / "list.yaml").write_text(yaml.safe_dump(MINE))
    keeper, record, evaluation = parsed(fit, *arguments).callbacks
    assert (keeper.init_args.monitor, keeper.init_args.save_top_k, keeper.init_args.save_last) == ("loss", 1, None)
    assert keeper.init_args.every_n_train_steps is None
    assert record.init_args.pictures_every == 0
    assert evaluation.init_args.scores == []


def test_what_is_given_for_single_callbacks_is_added(fit, tmp_path):
    more = tmp_path / "more.yaml"
    more.write_text(yaml.safe_dump({"trainer": {"callbacks+": [KEEPER]}}))
    last = ["--trainer.callbacks.count=12", f"--config={more}", "--trainer.callbacks+=GenerationVariety"]
    found = parsed(fit, *last, "--trainer.callbacks.samples=3").callbacks
    assert [each.class_path.rpartition(".")[2] for each in found[2:]] == [
        "GenerationEvaluation",
        "ModelCheckpoint",
        "GenerationVariety",
    ]
    assert (found[0].init_args.save_top_k, found[1].init_args.pictures_every) == (0, 50)
    assert (found[2].init_args.count, found[4].init_args.samples) == (12, 3)


def test_loggers_are_replaced_too_but_one_of_them_is_changed(fit):
    named = '{"class_path": "TensorBoardLogger", "init_args": {"save_dir": "here"}}'
    (logger,) = parsed(fit, f"--trainer.logger=[{named}]").logger
    assert (logger.init_args.save_dir, logger.init_args.name) == ("here", "lightning_logs")
    logger = parsed(fit, f"--trainer.logger={named}").logger
    assert (logger.init_args.save_dir, logger.init_args.name) == ("here", "shapes")


NAMED = {"class_path": "ContrastiveReward", "init_args": {"path": "package:assets/shapes/scorer", "batch_size": 7}}
PLAIN = {"class_path": "ContrastiveReward", "init_args": {"path": "package:assets/shapes/scorer"}}
SHAPES = {"class_path": "ShapesReward"}


def combined(*rewards):
    return {"class_path": "CombinedReward", "init_args": {"rewards": rewards, "weights": [1.0] * len(rewards)}}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--config=mine.yaml"],
        ["-c", "mine.yaml"],
        ["--model.reward=reward.yaml"],
        [f"--model.reward={json.dumps(combined(PLAIN, SHAPES))}"],
        ["--model.reward.rewards", json.dumps([PLAIN, SHAPES])],
        [f"--model.reward.rewards={json.dumps([PLAIN, SHAPES])}"],
    ],
)
def test_lists_in_classes_are_replaced_whole(fit, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    for name, rewards in (("earlier", [NAMED, SHAPES]), ("mine", [PLAIN, SHAPES])):
        model = {"init_args": {"reward": combined(*rewards)}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(json.dumps({"model": model}))))
    (tmp_path / "reward.yaml").write_text(json.dumps(combined(PLAIN, SHAPES)))
    given = ["fit", *fit_arguments(["--config", "shapes.yaml", "--config", "earlier.yaml", *arguments])]
    fit.parse_arguments(fit.parser, given)
    first, second = fit.config.fit.model.init_args.reward.init_args.rewards
    assert first.init_args.batch_size == 32
    assert second.class_path.endswith("ShapesReward")


def test_scores_of_the_last_evaluation_are_replaced_whole(fit):
    scores = [[{"class_path": "RewardScore", "init_args": {"reward": each}}] for each in (NAMED, PLAIN)]
    evaluation = [{"class_path": "GenerationEvaluation", "init_args": {"scores": scores[0]}}]
    again = f"--trainer.callbacks.scores={json.dumps(scores[1])}"
    (found,) = parsed(fit, f"--trainer.callbacks={json.dumps(evaluation)}", again).callbacks
    (score,) = found.init_args.scores
    assert score.init_args.reward.init_args.batch_size == 32


def test_settings_of_a_list_given_once_are_changed(fit):
    given = ["--config", "shapes.yaml", f"--model.reward={json.dumps(combined(NAMED, SHAPES))}"]
    fit.parse_arguments(fit.parser, ["fit", *fit_arguments([*given, "--model.reward.weights=[2, 3]"])])
    reward = fit.config.fit.model.init_args.reward
    assert (reward.init_args.weights, reward.init_args.rewards[0].init_args.batch_size) == ([2, 3], 7)


def test_a_value_that_names_a_file_of_weights_is_not_read(tmp_path, monkeypatch):
    checkpoint = tmp_path / "last.ckpt"
    checkpoint.write_text("[broken")
    monkeypatch.setattr(type(checkpoint), "read_text", lambda *_, **__: pytest.fail("it was read"))
    arguments = ["--model.start_from", str(checkpoint), f"--ckpt_path={checkpoint}"]
    assert fit_arguments(arguments) == arguments
