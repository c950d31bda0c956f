"""The directory of a run is decided once, is its own, and is reserved while it runs."""

import pickle
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from gdmd_lightning.callbacks.run_directory import RunDirectory, run_directory, starts_over
from gdmd_lightning.configuration.resuming import place_given, resolve_checkpoint
from gdmd_lightning.errors import UserError


class Placeless(Logger):
    """A logger without a directory for each run, as that of W&B is."""

    name, version, save_dir = "project", "abc", None

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params):
        pass


def trainer(where: Path, logger=False, *callbacks) -> pl.Trainer:
    keepers = [c for c in callbacks if isinstance(c, ModelCheckpoint)] or [ModelCheckpoint(save_last=True)]
    return pl.Trainer(
        accelerator="cpu", devices=1, logger=logger, default_root_dir=where, callbacks=[RunDirectory(), *keepers]
    )


def choose(chosen: pl.Trainer, resumed: Path | None = None, updates: int = 0, placed: bool = False) -> RunDirectory:
    callback = next(c for c in chosen.callbacks if isinstance(c, RunDirectory))
    callback.choose(chosen, resumed, updates, placed=placed)
    return callback


def finished(path: Path, **content) -> Path:
    """A checkpoint of an earlier run in this directory."""
    last = path / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"state_dict": {}, "global_step": 2, **content}, last)
    return last


LOGGERS = {
    "none": lambda where: False,
    "without a directory": lambda where: Placeless(),
    "csv": lambda where: CSVLogger(where, "project"),
    "tensorboard": lambda where: TensorBoardLogger(where, "project"),
    "two": lambda where: [Placeless(), CSVLogger(where, "project"), TensorBoardLogger(where, "project")],
}


@pytest.mark.parametrize("kind", LOGGERS)
def test_every_run_gets_a_directory_of_its_own_for_everything(tmp_path, kind):
    for number in (0, 1):
        made = trainer(tmp_path, LOGGERS[kind](tmp_path))
        run = choose(made)
        assert run.path == tmp_path / ("lightning_logs" if kind == "none" else "project") / f"version_{number}"
        assert run_directory(made) == run.path
        assert made.checkpoint_callback.dirpath == str(run.path / "checkpoints")
        for logger in made.loggers:
            assert isinstance(logger, Placeless) or Path(logger.log_dir) == run.path
        finished(run.path)
        run.release()


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
@pytest.mark.parametrize("version", [None, "first"])
@pytest.mark.parametrize("place", ["~/runs", "$HOME/runs"])
def test_a_place_in_the_home_directory_is_one(tmp_path, monkeypatch, kind, version, place):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for number in (0, 1):
        logger = kind(place, "project", version and version + str(number))
        run = choose(trainer(tmp_path, logger))
        assert run.path == tmp_path / "runs" / "project" / (f"first{number}" if version else f"version_{number}")
        assert Path(logger.log_dir) == run.path
        logger.log_metrics({"loss": 1.0}, step=1)
        logger.save()
        assert any(path.name.startswith(("metrics.csv", "events")) for path in run.path.iterdir())
        run.release()
    assert not list((tmp_path / "here").iterdir())


def test_a_csv_logger_does_not_warn_of_what_is_in_the_new_directory(tmp_path, recwarn):
    made = trainer(tmp_path, CSVLogger(tmp_path, "x"))
    run = choose(made)
    (run.path / "config.yaml").write_text("settings")
    made.logger.log_hyperparams({"steps": 4})
    made.logger.log_metrics({"loss": 0.5}, step=1)
    made.logger.save()
    assert not [each for each in recwarn if "deleted" in str(each.message)]
    assert (run.path / "metrics.csv").read_text().split() == ["loss,step", "0.5,1"]
    assert "steps" in (run.path / "hparams.yaml").read_text()


def test_two_runs_at_once_get_two_directories(tmp_path):
    paths = [choose(trainer(tmp_path)).path for _ in range(2)]
    assert [path.name for path in paths] == ["version_0", "version_1"]


def test_run_directory_keeps_a_checkpoint_directory_that_the_user_gave(tmp_path):
    made = trainer(tmp_path, False, ModelCheckpoint(tmp_path / "mine"))
    choose(made)
    assert made.checkpoint_callback.dirpath == str(tmp_path / "mine")


def test_a_directory_in_use_is_refused(tmp_path):
    first = choose(trainer(tmp_path, CSVLogger(tmp_path, "x", 0)))
    with pytest.raises(UserError, match=r"version_0: another run writes to this directory \(process \d+ on "):
        choose(trainer(tmp_path, CSVLogger(tmp_path, "x", 0)))
    first.release()
    choose(trainer(tmp_path, CSVLogger(tmp_path, "x", 0)))


@pytest.mark.parametrize(("nodes", "launched"), [(1, False), (1, True), (2, False)])
def test_a_refusal_waits_for_ranks_that_run_already(tmp_path, monkeypatch, nodes, launched):
    """On one node without a launcher, there are none: rank 0 starts them after its decision."""
    if launched:
        monkeypatch.setenv("LOCAL_RANK", "0")
    where = {"logger": CSVLogger(tmp_path, "x", 0), "default_root_dir": tmp_path, "callbacks": [RunDirectory()]}
    made = pl.Trainer(accelerator="cpu", devices=2, num_nodes=nodes, strategy="ddp", **where)
    running = choose(trainer(tmp_path, CSVLogger(tmp_path, "x", 0)))
    if nodes == 1 and not launched:
        with pytest.raises(UserError, match="another run writes to this directory"):
            choose(made)
    else:
        assert choose(made).path is None
        assert made.loggers == []
        # What the others get has been pickled.
        monkeypatch.setattr(made.strategy, "broadcast", lambda sent: pickle.loads(pickle.dumps(sent)))
        with pytest.raises(UserError, match=r"version_0: another run writes to this directory"):
            made.callbacks[0].setup(made, None, "fit")
    running.release()


@pytest.mark.parametrize(
    "left", ["checkpoints/last.ckpt", "gradient_rewards/part-00000000-0.parquet", "pictures/1.png", "metrics.csv"]
)
def test_results_of_another_run_are_refused_without_its_checkpoint(tmp_path, left):
    file = tmp_path / "x" / "version_0" / left
    file.parent.mkdir(parents=True)
    file.write_text("theirs")
    remedy = "continue that run with --ckpt_path" if left.endswith(".ckpt") else "remove it, as it has no last.ckpt"
    with pytest.raises(UserError, match=f"version_0: it has results of another run; {remedy}"):
        choose(trainer(tmp_path, CSVLogger(tmp_path, "x", 0)))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert file.read_text() == "theirs"


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_run_that_was_killed_before_its_first_checkpoint_starts_over(tmp_path, kind):
    run = tmp_path / "x" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("settings")
    (run / "metrics.csv").write_text("loss,step\n0.5,0\n0.4,1\n")
    made = trainer(tmp_path, kind(tmp_path, "x", "first"))
    chosen = next(c for c in made.callbacks if isinstance(c, RunDirectory))
    for other in (None, "other settings"):
        with pytest.raises(UserError, match="it has results of another run"):
            chosen.choose(made, None, 0, placed=True, configuration=other)
    chosen.choose(made, None, 0, placed=True, configuration="settings")
    assert chosen.starts_over
    assert starts_over(made)
    chosen.on_train_start(made, None)
    if kind is TensorBoardLogger:
        assert made.logger._kwargs["purge_step"] == 0
    else:
        assert (run / "metrics.csv").read_text().split() == ["loss,step"]


@pytest.mark.parametrize("place", ["run/checkpoints", "mine"])
def test_run_with_any_checkpoint_does_not_start_over(tmp_path, place):
    run = tmp_path / "run"
    (tmp_path / place).mkdir(parents=True)
    run.mkdir(exist_ok=True)
    (run / "config.yaml").write_text("settings")
    (run / "metrics.csv").write_text("loss,step\n0.5,1\n")
    (tmp_path / place / "step=1.ckpt").write_text("")
    keeper = ModelCheckpoint(tmp_path / "mine" if place == "mine" else None)
    made = trainer(tmp_path, CSVLogger(tmp_path, "", "run"), keeper)
    with pytest.raises(UserError, match="it has results of another run"):
        made.callbacks[0].choose(made, None, 0, placed=True, configuration="settings")


def test_a_run_that_wrote_nothing_leaves_no_directory(tmp_path):
    run = choose(trainer(tmp_path))
    run.release()
    assert not run.path.exists()


@pytest.mark.parametrize("kind", LOGGERS)
@pytest.mark.parametrize("placed", [False, True])
def test_resumed_run_continues_in_its_directory(tmp_path, kind, placed):
    name = "lightning_logs" if kind == "none" else "project"
    last = finished(tmp_path / name / "version_3")
    finished(tmp_path / name / "version_4")
    made = trainer(tmp_path, LOGGERS[kind](tmp_path))
    assert choose(made, last, placed=placed).path == tmp_path / name / "version_3"
    for logger in made.loggers:
        assert isinstance(logger, Placeless) or Path(logger.log_dir) == tmp_path / name / "version_3"


def test_resumed_run_goes_where_the_user_says(tmp_path):
    last = finished(tmp_path / "a" / "version_0")
    other = TensorBoardLogger(tmp_path, "b")
    assert choose(trainer(tmp_path, other), last, placed=True).path == tmp_path / "b" / "version_0"
    numbered = TensorBoardLogger(tmp_path, "a", 7)
    assert choose(trainer(tmp_path, numbered), last).path == tmp_path / "a" / "version_7"
    shipped = TensorBoardLogger(tmp_path, "b")  # the user did not choose it
    assert choose(trainer(tmp_path, shipped), last).path == tmp_path / "a" / "version_0"
    assert Path(shipped.log_dir) == tmp_path / "a" / "version_0"


def test_resumed_csv_log_keeps_the_rows_up_to_the_checkpoint(tmp_path):
    last = finished(tmp_path / "x" / "version_0")
    csv = last.parents[1] / "metrics.csv"
    csv.write_text("loss,step\n0.5,1\n0.4,2\n0.3,3\n")
    logger = CSVLogger(tmp_path, "x")
    before = csv.read_text()
    made = trainer(tmp_path, logger)
    run = choose(made, last, updates=2)
    logger.save()
    assert csv.read_text() == before, "the checkpoint may still be refused"
    assert not (csv.parent / "hparams.yaml").exists()
    run.on_train_start(made, None)
    logger.log_metrics({"loss": 0.25, "other": 1.0}, step=3)
    logger.save()
    assert [row.split(",") for row in csv.read_text().split()] == [
        ["loss", "other", "step"],
        ["0.5", "", "1"],
        ["0.4", "", "2"],
        ["0.25", "1.0", "3"],
    ]


def test_resumed_tensorboard_hides_what_came_after_the_checkpoint(tmp_path):
    logger = TensorBoardLogger(tmp_path, "x")
    choose(trainer(tmp_path, logger), finished(tmp_path / "x" / "version_0"), updates=2)
    assert logger._kwargs["purge_step"] == 3


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/lightning_logs: cannot be written: .*; give another place"):
        choose(trainer(tmp_path / "file"))


# --ckpt_path last, last_or_new and best.


def test_last_is_the_last_checkpoint_of_the_newest_run(tmp_path):
    for number in (0, 2, 10):
        finished(tmp_path / "x" / f"version_{number}")
    (tmp_path / "x" / "version_11").mkdir()
    found = resolve_checkpoint("last", trainer(tmp_path, TensorBoardLogger(tmp_path, "x")))
    assert found == tmp_path / "x" / "version_10" / "checkpoints" / "last.ckpt"
    one = resolve_checkpoint("last", trainer(tmp_path, TensorBoardLogger(tmp_path, "x", 2)))
    assert one == tmp_path / "x" / "version_2" / "checkpoints" / "last.ckpt"


def test_last_without_a_run_is_refused(tmp_path):
    finished(tmp_path / "other" / "version_0")
    with pytest.raises(UserError, match=r"ckpt_path last: no run in '.*x' has a last.ckpt; give the path of a .ckpt"):
        resolve_checkpoint("last", trainer(tmp_path, TensorBoardLogger(tmp_path, "x")))


def test_last_or_new_is_the_last_checkpoint_of_its_version_or_none(tmp_path):
    last = finished(tmp_path / "x" / "version_0")
    assert resolve_checkpoint("last_or_new", trainer(tmp_path, TensorBoardLogger(tmp_path, "x", 0))) == last
    assert resolve_checkpoint("last_or_new", trainer(tmp_path, TensorBoardLogger(tmp_path, "x", 1))) is None


def test_last_or_new_without_a_version_is_refused(tmp_path):
    finished(tmp_path / "x" / "version_0")
    with pytest.raises(UserError, match=r"ckpt_path last_or_new: it continues one run.*; use .* with a version"):
        resolve_checkpoint("last_or_new", trainer(tmp_path, TensorBoardLogger(tmp_path, "x")))


def test_best_needs_a_monitored_score(tmp_path):
    finished(tmp_path / "x" / "version_0")
    with pytest.raises(UserError, match="ckpt_path: no ModelCheckpoint monitors a score"):
        resolve_checkpoint("best", trainer(tmp_path, TensorBoardLogger(tmp_path, "x")))


def test_best_is_the_one_that_the_last_checkpoint_knows(tmp_path):
    state = {"monitor": "eval/x", "best_model_path": "/moved/best.ckpt"}
    last = finished(tmp_path / "x" / "version_0", callbacks={"ModelCheckpoint": state})
    made = trainer(tmp_path, TensorBoardLogger(tmp_path, "x"), ModelCheckpoint(monitor="eval/x"))
    with pytest.raises(UserError, match="that run has no best checkpoint"):
        resolve_checkpoint("best", made)
    (last.parent / "best.ckpt").write_text("")
    assert resolve_checkpoint("best", made) == last.parent / "best.ckpt"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--config", "{shipped}", "--trainer.max_steps=3"], False),
        (["--config", "{shipped}", "--trainer.logger.init_args.name", "x"], True),
        (["--trainer.logger=CSVLogger"], True),
        (["--trainer.default_root_dir=x"], True),
        (["--config={mine}"], True),
        (["--config", "{mine}"], True),
        (["-c", "{other}"], False),
    ],
)
def test_place_given_is_what_the_user_wrote(tmp_path, arguments, expected):
    from gdmd_lightning.locations import find_config

    mine, other = tmp_path / "mine.yaml", tmp_path / "other.yaml"
    mine.write_text("trainer: {logger: {class_path: CSVLogger}}")
    other.write_text("trainer: {max_steps: 3}\nmodel:\n")
    places = {"shipped": find_config("shapes.yaml"), "mine": mine, "other": other}
    assert place_given([argument.format(**places) for argument in arguments]) is expected
