"""A run that is stopped, killed or extended equals an uninterrupted one to the bit."""

import signal
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
from conftest import cli_command, cli_environment, write_fast_config

from gdmd_lightning.configuration import training
from gdmd_lightning.methods.checkpointing import WholeCheckpoints, read_checkpoint

# The parts of a checkpoint that equal runs have in common; paths and versions may differ.
CONTENTS = ("state_dict", "optimizer_states", "lr_schedulers", "PromptDataModule", "global_step")


def train(fast_fit: list[str], directory: Path, *arguments: str) -> Path:
    """Run ``fit`` in this process with its logs in ``directory / "run"``; returns the last checkpoint."""
    training.run([*fast_fit, f"--trainer.logger.init_args.save_dir={directory}", *arguments])
    return directory / "run" / "checkpoints" / "last.ckpt"


def step_of(path: Path) -> int:
    return read_checkpoint(str(path))["global_step"]


def differing(one: Path, other: Path) -> list[str]:
    a, b = read_checkpoint(str(one)), read_checkpoint(str(other))
    return tiny.differing({k: a[k] for k in CONTENTS}, {k: b[k] for k in CONTENTS})


def stopped(fast_fit: list[str], directory: Path, number: signal.Signals) -> tuple[int, str, Path]:
    """Signal a ``fit`` process during training; returns status, output and checkpoint directory."""
    endless = ["--trainer.max_steps=100000", f"--trainer.logger.init_args.save_dir={directory}"]
    process = subprocess.Popen(
        cli_command("fit", *fast_fit, *endless),
        cwd=directory,
        env=cli_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    last = directory / "run" / "checkpoints" / "last.ckpt"
    try:
        limit = time.monotonic() + 120
        while not last.exists() and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(0.2)  # now within an update, or within the writing of a checkpoint
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, printed, last.parent


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_fit_resumes_exactly_from_the_checkpoint_of_a_signal(fast_fit, tmp_path, number, status):
    code, printed, checkpoints = stopped(fast_fit, tmp_path, number)
    assert code == status, printed
    assert "Traceback" not in printed
    interrupted = checkpoints / "interrupted.ckpt"
    assert f"--ckpt_path {interrupted}" in printed
    step = step_of(interrupted)
    until = f"--trainer.max_steps={step + 3}"
    resumed = train(fast_fit, tmp_path / "resumed", until, f"--ckpt_path={interrupted}")
    uninterrupted = train(fast_fit, tmp_path / "alone", until)
    assert step_of(resumed) == step + 3
    assert differing(resumed, uninterrupted) == []


@pytest.mark.slow
def test_fit_resumes_exactly_after_kill_9(fast_fit, tmp_path):
    code, printed, checkpoints = stopped(fast_fit, tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL, printed
    last = checkpoints / "last.ckpt"
    step = step_of(last)
    assert step >= 2
    assert step % 2 == 0
    until = f"--trainer.max_steps={step + 3}"
    # In the same directory, as a user would: the record drops rows written after the checkpoint.
    resumed = train(fast_fit, tmp_path, until, f"--ckpt_path={last}")
    uninterrupted = train(fast_fit, tmp_path / "alone", until)
    assert resumed == last
    assert differing(resumed, uninterrupted) == []
    assert rows(tmp_path / "run") == rows(tmp_path / "alone" / "run")


def rows(run: Path) -> list[dict]:
    import pyarrow.dataset as ds

    table = ds.dataset(sorted(map(str, (run / "gradient_rewards").glob("part-*.parquet")))).to_table()
    return table.sort_by([(name, "ascending") for name in ("step", "state", "target")]).to_pylist()


VARIANTS = {
    "default": [],
    "snapshots": ["--model.targets.over=both", "--model.targets.snapshot_every=2", "--model.targets.size=3"],
    "renoise, fresh": ["--model.sampler=Renoise", "--model.matching.fake_score_samples=fresh"],
    "DMD": ["--config", "shapes_dmd.yaml", "--config", "{saving}"],
    "adapters": ["--model.lora.rank=2", "--model.lora.alpha=2", "--model.memory.gradient_checkpointing=true"],
}
# At 2 updates ModelCheckpoint saves; at 3 only the end of the run does. By 40 some prompts have repeated; a resumed run
# does not remember the earlier ones.
FAST = {("default", 3)}
CASES = [(name, end) for name in VARIANTS for end in (2, 3, 40)]


@pytest.mark.parametrize(("name", "end"), [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in CASES])
def test_fit_extended_run_equals_a_longer_one(fast_fit, tmp_path, name, end):
    saving = tmp_path / "saving.yaml"
    keeper = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true, save_top_k: 0}}"
    saving.write_text(f"trainer: {{callbacks: [{keeper}]}}\n")
    variant = [argument.format(saving=saving) for argument in VARIANTS[name]]
    first = train(fast_fit, tmp_path / "first", *variant, f"--trainer.max_steps={end}")
    assert step_of(first) == end
    longer = f"--trainer.max_steps={end + 2}"
    resumed = train(fast_fit, tmp_path / "resumed", *variant, longer, f"--ckpt_path={first}")
    alone = train(fast_fit, tmp_path / "alone", *variant, longer)
    assert differing(resumed, alone) == []


def test_max_steps_counts_updates_not_optimizer_steps(fast_fit, tmp_path):
    last = train(fast_fit, tmp_path, "--trainer.max_steps=2", "--model.matching.fake_score_updates=3")
    content = read_checkpoint(str(last))
    steps = [int(state["state"][0]["step"]) for state in content["optimizer_states"]]
    assert content["global_step"] == 2
    assert steps == [2, 6]


def test_every_n_train_steps_counts_updates(fast_fit, tmp_path):
    config = tmp_path / "all.yaml"
    keeper = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_top_k: -1, filename: '{step}'}}"
    config.write_text(f"trainer: {{callbacks: [{keeper}]}}\n")
    train(fast_fit, tmp_path, "--config", str(config), "--trainer.max_steps=5")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"step=2.ckpt", "step=4.ckpt"}


def handlers() -> list:
    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.fixture(scope="module")
def one_update(tiny_pipeline, tmp_path_factory):
    """A run of one update: signal handlers before and after, its command line and its checkpoint."""
    place, before = tmp_path_factory.mktemp("one"), handlers()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("tempfile.mkstemp", None)
        arguments = write_fast_config(place / "fast.yaml", tiny_pipeline, place)
        cli = training.run([*arguments, "--trainer.max_steps=1"])
    return before, handlers(), cli, place / "run" / "checkpoints" / "last.ckpt"


def test_fit_saves_the_last_update_and_restores_signal_handlers(one_update):
    before, after, _, last = one_update
    assert step_of(last) == 1
    assert after == before


class Unsavable:
    """Fails while it is being written, like a full disk."""

    def __reduce__(self):
        raise OSError("no space left on device")


def test_save_checkpoint_that_fails_keeps_the_previous_one(tmp_path):
    place = tmp_path / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"state_dict": {"x": torch.ones(1)}}, place)
    with pytest.raises(OSError, match="no space"):
        WholeCheckpoints().save_checkpoint({"state_dict": {"x": torch.zeros(1000), "y": Unsavable()}}, place)
    assert read_checkpoint(str(place))["state_dict"]["x"].item() == 1


def test_fit_writes_checkpoints_without_the_temporary_directory(one_update):
    _, _, cli, last = one_update
    assert type(cli.trainer.strategy.checkpoint_io) is WholeCheckpoints
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt"}
