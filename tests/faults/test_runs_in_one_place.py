"""Runs that share a working directory: one directory each, and a resumed run continues in its own."""

import hashlib
import re
import shutil
from pathlib import Path

import pyarrow.dataset as ds
import pytest
from conftest import PICTURES

from gdmd_lightning.callbacks.logged_figures import read_figures
from gdmd_lightning.cli import main
from gdmd_lightning.configuration import training
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint


def contents(place: Path) -> dict[str, str]:
    files = [path for path in place.rglob("*") if path.is_file()]
    return {str(path.relative_to(place)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def placeless(fast_fit: list[str]) -> list[str]:
    """The cheap configuration without its logger."""
    return [*fast_fit, *PICTURES, "--trainer.logger=false", "--trainer.max_steps=2"]


@pytest.fixture
def place(fast_fit, tmp_path, monkeypatch) -> Path:
    """A working directory without the configuration's own files."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "lightning_logs"


@pytest.fixture
def kept(fast_fit, tmp_path) -> list[str]:
    """The cheap configuration with a checkpoint of every update."""
    keeper = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, save_top_k: -1, filename: '{step}'}}"
    (tmp_path / "kept.yaml").write_text(f"trainer: {{log_every_n_steps: 1, callbacks: [{keeper}]}}\n")
    return [*fast_fit, "--config", str(tmp_path / "kept.yaml")]


# callbacks/test_gradient_record.py continues a run twice without fit.
@pytest.mark.parametrize("ends", [(4,), pytest.param((5, 4), marks=pytest.mark.slow)])
def test_second_run_leaves_the_first_unchanged_and_a_resumed_one_continues_it(fast_fit, place, ends):
    training.run(placeless(fast_fit))
    before = contents(place)
    kinds = {re.sub(r"\d{6,}", "N", name) for name in before}
    assert kinds == {
        "version_0/config.yaml",
        "version_0/checkpoints/last.ckpt",
        "version_0/gradient_rewards/part-N-0.parquet",
        "version_0/gradient_rewards/pictures-N.safetensors",
        "version_0/pictures/N.png",
        "version_0/evaluations/shapes/N/N-0.png",
        "version_0/evaluations/shapes/N/pictures.jsonl",
    }
    training.run(placeless(fast_fit))
    after = contents(place)
    assert {name: after[name] for name in before} == before
    assert {name.replace("version_1", "version_0") for name in after} == set(before)
    # The first run is continued from update 2, perhaps twice, as after a kill: each update is recorded once.
    last = place / "version_0" / "checkpoints" / "last.ckpt"
    two = shutil.copy(last, last.parent / "two.ckpt")
    for end in ends:
        training.run([*placeless(fast_fit), f"--trainer.max_steps={end}", f"--ckpt_path={two}"])
        assert read_checkpoint(str(last), in_memory=False)["global_step"] == end
    parts = sorted(map(str, (place / "version_0" / "gradient_rewards").glob("part-*.parquet")))
    steps = ds.dataset(parts).to_table()["step"].to_pylist()
    assert {step: steps.count(step) for step in steps} == dict.fromkeys(range(4), 8 * 2)
    assert {path.name for path in last.parent.iterdir()} == {"last.ckpt", "two.ckpt"}
    assert {path.name for path in place.iterdir()} == {"version_0", "version_1"}
    # "last" is the run that was written to last.
    cli = training.run([*placeless(fast_fit), "--trainer.max_steps=5", "--ckpt_path=last"])
    assert cli.trainer.ckpt_path == str(last)
    assert cli.trainer.global_step == 5


def test_refused_resume_changes_nothing(kept, tmp_path):
    logger = f"{{class_path: CSVLogger, init_args: {{save_dir: {tmp_path}, name: run, version: .}}}}"
    arguments = [*kept, f"--trainer.logger={logger}"]
    training.run([*arguments, "--trainer.max_steps=2"])
    before = contents(tmp_path / "run")
    resumed = [*arguments, f"--ckpt_path={tmp_path / 'run' / 'checkpoints' / 'step=1.ckpt'}", "--trainer.max_steps=3"]
    with pytest.raises(UserError, match="lora"):
        training.run([*resumed, "--model.lora={rank: 2, alpha: 2}"])
    assert contents(tmp_path / "run") == before
    training.run(resumed)
    assert [update for update, _ in read_figures(tmp_path / "run", "loss")["loss"]] == [1, 2, 3]
    assert "max_steps: 3" in (tmp_path / "run" / "config.yaml").read_text()


def test_last_or_new_starts_a_run_over_that_has_no_checkpoint_yet(fast_fit, tmp_path):
    arguments = [*fast_fit, *PICTURES, "--ckpt_path=last_or_new", "--trainer.max_steps=2"]
    training.run(arguments)
    run = tmp_path / "run"
    shutil.rmtree(run / "checkpoints")  # as if it had been killed earlier
    training.run(arguments)
    assert read_checkpoint(str(run / "checkpoints" / "last.ckpt"), in_memory=False)["global_step"] == 2
    assert [update for update, _ in read_figures(run, "loss")["loss"]] == [1, 2]
    steps = ds.dataset(sorted(map(str, run.glob("gradient_rewards/part-*.parquet")))).to_table()["step"].to_pylist()
    assert {step: steps.count(step) for step in steps} == dict.fromkeys(range(2), 8 * 2)


def test_last_without_a_run_is_an_error(fast_fit, place, complaint):
    assert complaint("fit", *placeless(fast_fit), "--ckpt_path=last").startswith("ckpt_path last: no run in ")
    assert not place.exists()


@pytest.mark.parametrize("name", ["hpc", "registry"])
def test_other_names_of_checkpoints_are_refused(fast_fit, complaint, name):
    assert complaint("fit", *fast_fit, f"--ckpt_path={name}").startswith(f"checkpoint: no checkpoint '{name}'; ")


def test_last_checkpoint_is_the_last_with_several_callbacks(fast_fit, tmp_path):
    config = tmp_path / "keepers.yaml"
    keepers = [
        "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true, save_top_k: 0}}",
        "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 3, save_top_k: -1, filename: '{step}'}}",
        "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 1, save_last: true, save_top_k: 1}}",
    ]
    config.write_text(f"trainer: {{callbacks: [{', '.join(keepers)}]}}\n")
    main(["fit", *fast_fit, "--config", str(config), "--trainer.max_steps=3"])
    checkpoints = tmp_path / "run" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"last.ckpt", "step=3.ckpt", "epoch=0-step=3.ckpt"}
    assert read_checkpoint(str(checkpoints / "last.ckpt"), in_memory=False)["global_step"] == 3


def test_tensorboard_hides_what_came_after_the_checkpoint_that_is_resumed(kept, tmp_path):
    training.run([*kept, "--trainer.max_steps=3"])
    one = tmp_path / "run" / "checkpoints" / "step=1.ckpt"
    training.run([*kept, "--trainer.max_steps=2", f"--ckpt_path={one}"])
    assert [update for update, _ in read_figures(tmp_path / "run", "loss")["loss"]] == [1, 2]
