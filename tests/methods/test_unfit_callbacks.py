"""What the trainer takes but a run leaves without effect is refused before anything is loaded."""

from datetime import timedelta

import pytest
import tiny
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from gdmd_lightning.configuration import training
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
    said = "trainer.overfit_batches: it has no effect: prompts go on as they come, in every epoch; use a data.source of"
    assert refused(tiny_pipeline, overfit_batches=batches).startswith(said)


def test_the_command_line_refuses_overfit_batches(fast_fit):
    with pytest.raises(UserError, match=r"^trainer\.overfit_batches: it has no effect"):
        training.run([*fast_fit, "--trainer.overfit_batches=1"])
