"""A ModelCheckpoint whose figure nobody logs is refused when it is first due, and no other one is."""

import lightning.pytorch as pl
import pytest
import tiny
from lightning.pytorch.callbacks import ModelCheckpoint

from gdmd_lightning.callbacks.known_figures import CheckMonitors
from gdmd_lightning.callbacks.variety import GenerationVariety
from gdmd_lightning.configuration import training
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.refl import ReFL


class Rarely(pl.Callback):
    """Logs a figure of its own at every second update."""

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        if pl_module.updates % 2 == 0:
            pl_module.log("held_out", float(pl_module.updates), batch_size=1)


def train(pipeline, updates, *callbacks, ckpt_path=None):
    module = tiny.module(pipeline, ReFL, reward=tiny.Brightness(), steps=2)
    trainer = tiny.trainer(updates, callbacks=[*callbacks, CheckMonitors()], enable_checkpointing=True)
    data = training.PromptDataModule("shapes", batch_size=4, group_size=2)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def refused(pipeline, updates, *callbacks):
    with pytest.raises(UserError, match=r"^ModelCheckpoint\.monitor: no figure .*; there are .*'train/seconds'") as e:
        train(pipeline, updates, *callbacks)
    return str(e.value)


@pytest.mark.parametrize(
    ("monitor", "interval", "update"),
    [("train/los", 2, 2), ("train/los", None, 1), ("held_ou", 1, 1), ("lss", None, 3)],
)
def test_a_misspelled_figure_is_refused_when_it_is_first_due(tiny_pipeline, tmp_path, monitor, interval, update):
    keeper = ModelCheckpoint(tmp_path, monitor=monitor, every_n_train_steps=interval)
    assert f"no figure {monitor!r} has been logged by update {update}; " in refused(tiny_pipeline, 3, Rarely(), keeper)


def test_what_is_first_due_in_the_last_update_is_refused_after_all_is_saved(tiny_pipeline, tmp_path):
    wrong = ModelCheckpoint(tmp_path / "best", monitor="held_ou", every_n_train_steps=2)
    other = ModelCheckpoint(tmp_path, "other", every_n_train_steps=2)
    assert "by update 2; " in refused(tiny_pipeline, 2, Rarely(), wrong, other)
    assert read_checkpoint(str(tmp_path / "other.ckpt"))["global_step"] == 2


def test_figures_that_come_later_are_waited_for(tiny_pipeline, tmp_path):
    variety = GenerationVariety(count=6, samples=2, every_n_updates=3)
    keepers = [
        ModelCheckpoint(tmp_path / "1", monitor="variety/diversity", every_n_train_steps=1),
        ModelCheckpoint(tmp_path / "2", monitor="held_out", every_n_train_steps=2),
        ModelCheckpoint(tmp_path / "3", monitor="held_out", every_n_train_steps=50),
        ModelCheckpoint(tmp_path / "4", monitor="step", every_n_train_steps=1),
        ModelCheckpoint(tmp_path / "5", monitor="held_out", save_top_k=-1),
    ]
    train(tiny_pipeline, 2, Rarely(), variety, *keepers)
    assert sorted(place.name for place in tmp_path.iterdir()) == ["2", "4", "5"]
    wrong = ModelCheckpoint(tmp_path / "6", monitor="variety/divers", every_n_train_steps=1)
    assert "'variety/divers' has been logged by update 3; " in refused(tiny_pipeline, 4, Rarely(), variety, wrong)


def test_a_resumed_run_waits_for_its_own_first_figures(tiny_pipeline, tmp_path):
    train(tiny_pipeline, 3, ModelCheckpoint(tmp_path, "3", every_n_train_steps=3))
    variety = GenerationVariety(count=6, samples=2, every_n_updates=3)
    keeper = ModelCheckpoint(tmp_path / "best", monitor="variety/diversity", every_n_train_steps=2)
    assert train(tiny_pipeline, 5, variety, keeper, ckpt_path=tmp_path / "3.ckpt").global_step == 5


def test_every_run_of_the_command_line_checks(fast_fit, monkeypatch):
    monkeypatch.setattr(training.DistillationCLI, "_run_subcommand", lambda self, name: None)
    callbacks = training.run(fast_fit).trainer.callbacks
    assert sum(isinstance(each, CheckMonitors) for each in callbacks) == 1
