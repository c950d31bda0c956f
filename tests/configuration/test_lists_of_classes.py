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
