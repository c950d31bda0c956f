"""What the trainer takes but a run leaves without effect is refused before anything is loaded."""

import re
from datetime import timedelta

import pytest
import tiny
import yaml
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    SpikeDetection,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)

from gdmd_lightning.configuration import training
from gdmd_lightning.engines.unfit import check_fitting
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.refl import ReFL


def refused(tiny_pipeline, *callbacks, updates=1, **options):
    """The message with which a trainer in Python refuses, before the module loads its networks."""
    module = tiny.module(tiny_pipeline, ReFL, reward=tiny.Brightness(), steps=2)
    with pytest.raises(UserError) as found:
        tiny.train(module, updates, callbacks=list(callbacks), **options)
    assert not hasattr(module, "roles")
    return str(found.value)


STOPPING = (
    "EarlyStopping: it looks at its figure when an epoch ends, and the only epoch is the whole run; "
    "use CollapseWatch with policy: stop, or EvaluationBudget"
)


@pytest.mark.parametrize("looks", [{}, {"check_on_train_epoch_end": False}])
def test_early_stopping_that_never_looks_is_refused(tiny_pipeline, looks):
    limit = {"limit_train_batches": 1} if looks else {}
    assert refused(tiny_pipeline, EarlyStopping("train/seconds", **looks), **limit) == STOPPING


def test_early_stopping_with_a_validation_interval_never_looks(tiny_pipeline):
    found = refused(tiny_pipeline, EarlyStopping("loss"), limit_train_batches=2, val_check_interval=2)
    assert found == STOPPING


def test_the_command_line_refuses_early_stopping(fast_fit):
    with pytest.raises(UserError, match=r"^EarlyStopping: it looks at its figure when an epoch ends"):
        training.run([*fast_fit, "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=los"])


def test_early_stopping_on_a_figure_that_is_not_there_is_one_line(fast_fit):
    stop = ["--trainer.limit_train_batches=1", "--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=los"]
    said = r"^EarlyStopping\.monitor: no figure 'los' has been logged by update 1; there are 'loss', 'step', 'train/"
    with pytest.raises(UserError, match=said):
        training.run([*fast_fit, *stop])


class AfterEveryUpdate(EarlyStopping):
    """Looks after every update."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        self._run_early_stopping_check(trainer)


@pytest.mark.parametrize(("kind", "options"), [(EarlyStopping, {"limit_train_batches": 1}), (AfterEveryUpdate, {})])
def test_early_stopping_that_looks_stops(tiny_pipeline, kind, options):
    module = tiny.module(tiny_pipeline, ReFL, reward=tiny.Brightness(), steps=2)
    stop = kind("train/seconds", min_delta=1e6, patience=1)
    assert tiny.train(module, 4, callbacks=[stop], **options).global_step == 2


@pytest.mark.parametrize("monitor", [None, "loss"])
def test_checkpoints_at_intervals_of_time_are_refused(tiny_pipeline, tmp_path, monitor):
    keeper = ModelCheckpoint(tmp_path, monitor=monitor, train_time_interval=timedelta(0))
    assert refused(tiny_pipeline, keeper, enable_checkpointing=True) == (
        "ModelCheckpoint.train_time_interval: Lightning saves at intervals of time under automatic optimization only, "
        "so nothing until the run ends; use every_n_train_steps, a number of updates"
    )


def test_the_command_line_refuses_intervals_of_time(fast_fit):
    keeper = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.train_time_interval=0:10:00"]
    with pytest.raises(UserError, match=r"^ModelCheckpoint\.train_time_interval: "):
        training.run([*fast_fit, *keeper])


@pytest.mark.parametrize("batches", [2, 1.0])
def test_overfit_batches_is_refused(tiny_pipeline, batches):
    said = "trainer.overfit_batches: it has no effect: prompts go on as they come, in every epoch; use a data.source"
    assert refused(tiny_pipeline, overfit_batches=batches).startswith(said)


def test_the_command_line_refuses_overfit_batches(fast_fit):
    with pytest.raises(UserError, match=r"^trainer\.overfit_batches: it has no effect"):
        training.run([*fast_fit, "--trainer.overfit_batches=1"])


@pytest.mark.parametrize("limits", [{"max_epochs": 2, "updates": -1}, {"max_epochs": 2, "updates": 1}, {"updates": -1}])
def test_epochs_that_never_end_are_refused(tiny_pipeline, limits):
    found = refused(tiny_pipeline, **{"max_epochs": None, **limits})
    assert found.startswith(f"trainer.max_epochs: it is {limits.get('max_epochs', 1000)}, but prompts go on as they ")


def test_epochs_of_a_given_length_end_the_run(tiny_pipeline):
    module = tiny.module(tiny_pipeline, ReFL, reward=tiny.Brightness(), steps=2)
    assert tiny.train(module, -1, max_epochs=2, limit_train_batches=1).global_step == 2


@pytest.mark.parametrize(
    ("callback", "said"),
    [
        (lambda: GradientAccumulationScheduler({0: 2}), r"an update takes .*; use model\.accumulate"),
        (LearningRateFinder, r"it knows one optimizer, .*; set the learning rate of each role"),
        (BatchSizeFinder, r"an update keeps its size .*; set data\.batch_size, and model\.micro_batch_size"),
        (BackboneFinetuning, r".* without a backbone; use model\.lora"),
        (lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1), r".*; use model\.ema_decay"),
        (WeightAveraging, r".* checkpoints can be neither resumed nor exported; use model\.ema_decay"),
        (EMAWeightAveraging, r".*; use model\.ema_decay"),
        (SpikeDetection, r"it needs a single loss, .*; use CollapseWatch"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), r"it prunes layers .*; remove it"),
        (lambda: Timer("00:00:10:00", interval="epoch"), r"it looks at the time when an epoch ends, .*; use step"),
    ],
)
def test_callbacks_that_cannot_work_are_refused(tiny_pipeline, callback, said):
    unfit = callback()
    where = type(unfit).__name__ + (r"\.interval" if isinstance(unfit, Timer) else "")
    assert re.match(rf"{where}: {said}", found := refused(tiny_pipeline, unfit)), found


def test_what_acts_when_an_epoch_ends_is_accepted_where_the_prompts_have_an_end(tmp_path):
    callbacks = [Timer("00:00:10:00", interval="epoch"), EarlyStopping("loss")]
    for options in ({"callbacks": callbacks}, {"overfit_batches": 1}):
        check_fitting(tiny.trainer(1, default_root_dir=tmp_path, **options), endless=False)


def test_a_timer_in_a_configuration_ends_the_run(fast_fit, tmp_path):
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:00:00"]
    assert training.run([*fast_fit, *timer]).trainer.global_step == 0
    timer = ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:01:00:00"]
    assert training.run([*fast_fit, *timer]).trainer.global_step == 3
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (timer,) = (each for each in settings["trainer"]["callbacks"] if each["class_path"].endswith(".Timer"))
    assert timer["init_args"]["interval"] == "step"
