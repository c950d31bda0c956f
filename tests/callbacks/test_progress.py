"""A run says what it will do, how far it is, and what to do next."""

import io
import itertools
import logging
import re
import shlex
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

from gdmd_lightning.callbacks import progress
from gdmd_lightning.callbacks.gradient_record import GradientRewardRecord
from gdmd_lightning.callbacks.progress import Progress, clock
from gdmd_lightning.configuration.noise import is_noise, quiet
from gdmd_lightning.configuration.training import use_progress
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def trained(tiny_pipeline, updates=3, **options):
    bar = Progress(**options)
    tiny.train(tiny.module(tiny_pipeline, DMD), updates, callbacks=[bar], enable_progress_bar=True)
    return bar


def test_without_a_terminal_there_are_plain_lines(tiny_pipeline, capsys):
    trained(tiny_pipeline, every_seconds=1e-6)
    out, err = capsys.readouterr()
    values = r"  loss \d+\.?\d*  [\d.e-]+ s/update  \d+:\d\d left"
    expected = [
        r"DMD: 4 steps, 32x32 pixels, all weights",
        rf"teacher: {re.escape(str(tiny_pipeline))}",
        r"training: 3 updates of 8 samples \(4 per prompt\), on cpu, precision 32-true",
        r"run: .+",
        *(rf"update {n}/3{values}" for n in (1, 2, 3)),
        r"3 updates in \d+:\d\d, 3 in all",
    ]
    lines = out.splitlines()
    assert len(lines) == len(expected), out
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert "Epoch" not in err


@pytest.mark.parametrize(("batches", "lines"), [(None, 1), (1, 0)])
def test_a_checkpoint_without_an_interval_is_said_to_come_at_the_end(tiny_pipeline, tmp_path, capsys, batches, lines):
    callbacks = [Progress(), ModelCheckpoint(tmp_path)]
    options = {"callbacks": callbacks, "enable_checkpointing": True, "enable_progress_bar": True}
    tiny.train(tiny.module(tiny_pipeline, DMD), 1, limit_train_batches=batches, **options)
    said = f"checkpoints: at the end only, as it has no every_n_train_steps, in {tmp_path}\n"
    assert capsys.readouterr().out.count(said) == lines


def test_time_left_is_that_of_the_updates_that_are_left(tiny_pipeline, capsys, monkeypatch):
    seconds = itertools.count(100, 10)  # every look at the clock is 10 s later
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    trained(tiny_pipeline, every_seconds=1e-6)
    shown = re.findall(r"(\S+) s/update  (\S+) left", capsys.readouterr().out)
    assert shown == [("10", "0:20"), ("10", "0:10"), ("10", "0:00")]


def resumed(tiny_pipeline, capsys, place, updates, **options):
    """The lines of a run that goes on from update 2 of one that has kept its ``last.ckpt``."""

    def train(updates, ckpt_path=None, **options):
        keeper = ModelCheckpoint(place, every_n_train_steps=1, **options)
        trainer = tiny.trainer(
            updates, callbacks=[Progress(), keeper], enable_checkpointing=True, enable_progress_bar=True
        )
        data = PromptDataModule("shapes", batch_size=8, group_size=4)
        trainer.fit(tiny.module(tiny_pipeline, DMD), datamodule=data, ckpt_path=ckpt_path, weights_only=True)

    train(2, save_last=True)
    first = capsys.readouterr().out.splitlines()
    assert sum(str(place / "last.ckpt") in line for line in first) == 3
    train(updates, place / "last.ckpt", **options)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("save_last", [True, False])
def test_a_run_that_has_nothing_to_do_says_so(tiny_pipeline, capsys, tmp_path, save_last):
    lines = resumed(tiny_pipeline, capsys, tmp_path, 1, save_last=save_last)
    assert lines == ["nothing to do: 2 updates are done, and max_steps is 1"]
    trained(tiny_pipeline, updates=0)
    assert capsys.readouterr().out == "nothing to do: 0 updates are done, and max_steps is 0\n"


@pytest.mark.parametrize(("save_last", "top_k", "named"), [(True, 0, 3), (False, 0, 0), (False, 1, 0)])
def test_next_commands_name_only_what_this_run_has_saved(tiny_pipeline, capsys, tmp_path, save_last, top_k, named):
    lines = resumed(tiny_pipeline, capsys, tmp_path, 3, save_last=save_last, save_top_k=top_k)
    assert sum("last.ckpt" in line for line in lines) == named
    assert any(line.startswith("1 updates in ") and line.endswith(", 3 in all") for line in lines)


def commands(tiny_pipeline, capsys, place, *keepers, module=None, **options):
    """The printed commands of a finished run, by their label, as the arguments that a shell would make of them."""
    keepers = keepers or (ModelCheckpoint(place, every_n_train_steps=1, save_last=True),)
    where = {"default_root_dir": place, "enable_checkpointing": True, "enable_progress_bar": True, **options}
    tiny.train(module or tiny.module(tiny_pipeline, DMD), 2, callbacks=[Progress(), *keepers], **where)
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines()]
    labels = ("train longer", "sample", "export", "look at the record")
    return {label: shlex.split(line) for label, _, line in lines if label in labels}


def test_commands_quote_their_paths(tiny_pipeline, capsys, tmp_path):
    place = tmp_path / "it's my run"
    last = str(place / "last.ckpt")
    keepers = ModelCheckpoint(place, every_n_train_steps=1, save_last=True), GradientRewardRecord()
    found = commands(tiny_pipeline, capsys, place, *keepers, module=tiny.module(tiny_pipeline))
    longer = ["fit", "--config", f"{place}/config.yaml", "--ckpt_path", last, "--trainer.max_steps", "4"]
    assert found["train longer"][3:] == longer
    assert found["sample"][3:] == ["sample", last, "PROMPTS", f"{place}/samples"]
    assert found["export"][3:] == ["export", last, f"{place}/pipeline"]
    assert found["look at the record"][0] == f"GDMD_RUN={place}"


def test_commands_trust_the_users_own_classes_but_no_reward(tiny_pipeline, capsys, tmp_path):
    module = tiny.module(tiny_pipeline, DMD)
    family = {"class_path": "own.families.Mine", "init_args": {"path": "x"}}
    settings = {"family": family, "sampler": {"class_path": "gdmd_lightning.samplers.ODE"}}
    settings["reward"] = {"class_path": "liking.Mine"}
    model = {"class_path": "my_methods.Mine", "init_args": settings}
    module.provenance = replace(module.provenance, configuration=yaml.safe_dump({"model": model}))
    found = commands(tiny_pipeline, capsys, tmp_path, module=module)
    for label in ("sample", "export"):
        assert found[label][-4:] == ["--trust", "my_methods", "--trust", "own.families"]
    assert "--trust" not in found["train longer"]


def test_weights_alone_are_not_trained_longer(tiny_pipeline, capsys, tmp_path):
    weights = ModelCheckpoint(tmp_path / "weights", every_n_train_steps=1, save_last=True, save_weights_only=True)
    assert list(commands(tiny_pipeline, capsys, tmp_path, weights)) == ["sample", "export"]
    whole = ModelCheckpoint(tmp_path / "whole", every_n_train_steps=2, save_last=True)
    found = commands(tiny_pipeline, capsys, tmp_path, weights, whole)
    assert str(tmp_path / "whole" / "last.ckpt") in found["train longer"]


def test_a_fast_dev_run_names_no_commands(tiny_pipeline, capsys, tmp_path):
    assert commands(tiny_pipeline, capsys, tmp_path, fast_dev_run=2) == {}


def test_lines_are_seconds_apart_but_the_first_and_last_update_are_always_shown(tiny_pipeline, capsys):
    trained(tiny_pipeline, updates=4, every_seconds=1e6)
    shown = re.findall(r"^update (\d)/4", capsys.readouterr().out, re.MULTILINE)
    assert shown == ["1", "4"]


def test_bar_in_a_terminal_fits_80_columns_and_names_no_epoch(tiny_pipeline, capsys, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    trained(tiny_pipeline)
    frames = [frame.strip("\n") for frame in re.split(r"\r|\n", screen.getvalue()) if frame.strip()]
    assert re.match(r"3/3 \|#+\||3/3 \|█+\|", frames[-1]), frames
    assert " s/update " in frames[-1]
    assert max(map(len, frames)) < 80
    assert not any("Epoch" in frame or "v_num" in frame for frame in frames)
    assert "update 1/3" not in capsys.readouterr().out


def test_other_ranks_print_nothing(tiny_pipeline, capsys, monkeypatch):
    monkeypatch.setattr(Progress, "setup", lambda self, trainer, module, stage: self.disable())
    trained(tiny_pipeline, updates=1)
    assert capsys.readouterr().out == ""


def test_progress_takes_the_place_of_lightnings_own_bar_only():
    trainer = tiny.trainer(1, enable_progress_bar=True)
    use_progress(trainer)
    assert [type(c) for c in trainer.callbacks].count(Progress) == 1
    assert type(trainer.progress_bar_callback) is Progress
    without = tiny.trainer(1)
    use_progress(without)
    assert without.progress_bar_callback is None
    assert TQDMProgressBar not in map(type, trainer.callbacks)


def test_progress_refuses_no_time_between_lines():
    with pytest.raises(UserError, match=r"Progress.every_seconds: it is 0; use a number above 0"):
        Progress(every_seconds=0)


@pytest.mark.parametrize(("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3600 * 30, "30:00:00")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown


@pytest.mark.parametrize(
    ("message", "silent"),
    [
        ("GPU available: False, used: False", True),
        ("💡 Tip: For seamless cloud logging", True),
        ("Seed set to 3", True),
        ("[rank: 1] Seed set to 3", True),
        ("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.", True),
        ("SIGINT: stopping after this update, with a checkpoint", False),
    ],
)
def test_only_listed_messages_are_noise(message, silent):
    record = logging.LogRecord("lightning", logging.INFO, "", 0, message, (), None)
    assert is_noise(record) == silent
    quiet()
    for source in ("lightning.fabric.utilities.seed", "DeepSpeed"):
        assert bool(logging.getLogger(source).filter(record)) != silent
