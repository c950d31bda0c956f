"""What the tests share: a tiny pipeline, a cheap ``fit``, one recorded run, and the command line as a process."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported: bits must not depend on how many threads a sum is split over, and two cores are shared.
os.environ["OMP_NUM_THREADS"] = "1"
# The same messages in every terminal.
os.environ.update({"COLUMNS": "120", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"})

import pytest
import tiny
import torch
import yaml

from gdmd_lightning import cli

torch.set_num_threads(1)

HERE = Path(__file__).parent
REFUSAL = "gdmd_lightning: error: "
PICTURES = ["--trainer.callbacks.columns=3", "--trainer.callbacks.teacher_steps=2"]
"""Lets the evaluation of :func:`write_fast_config` draw, too."""
RunCli = Callable[..., subprocess.CompletedProcess[str]]


LAUNCH = ("LOCAL_RANK", "NODE_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher of ranks leaves in the environment."""


@pytest.fixture(autouse=True)
def launch_variables() -> Iterator[None]:
    """A Trainer in this process may leave these behind; a later ``fit`` would wait for ranks that nobody starts."""
    before = {name: os.environ.get(name) for name in LAUNCH}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def cli_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "gdmd_lightning", *map(str, arguments)]


def cli_environment() -> dict[str, str]:
    """Environment of the command line; configurations can name classes of the tests' modules."""
    before = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    places = [*before, *(str(HERE / name) for name in (".", "faults", "distributed"))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(places)}


@pytest.fixture
def run_cli(tmp_path: Path) -> RunCli:
    """``run_cli("fit", "--help")`` runs the command line in a new process, in the test's directory."""

    def run(*arguments: object, cwd: Path = tmp_path, check: bool = False) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            cli_command(*arguments), cwd=cwd, env=cli_environment(), capture_output=True, text=True, timeout=250
        )
        if check and done.returncode:
            raise AssertionError(f"status {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done

    return run


@pytest.fixture
def complaint(capsys, tmp_path, monkeypatch):
    """``complaint("fit", ...)`` returns the one-line error of the command line."""

    def refused(*arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        before = set(tmp_path.rglob("*.ckpt"))
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        assert stop.value.code == 2
        printed = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        lines = [line for line in printed if line.startswith(REFUSAL)]
        assert len(lines) == 1, printed
        assert printed[-1] == lines[0]
        assert len(lines[0]) < 600
        assert not any(line.startswith(("Traceback", "usage:")) for line in printed)
        assert set(tmp_path.rglob("*.ckpt")) == before, "a checkpoint of a run that never started"
        assert not list(tmp_path.rglob("*.part"))
        return lines[0].removeprefix(REFUSAL)

    return refused


@pytest.fixture
def no_network(monkeypatch) -> None:
    """Opening a socket fails; the libraries may, unlike in other tests."""
    import huggingface_hub

    def opened(*_: object, **__: object) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, opened)


@pytest.fixture
def float64() -> Iterator[None]:
    """New tensors are float64 inside the test."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``StableDiffusion3Pipeline`` directory with random weights, a second to load and milliseconds to train."""
    return tiny.save_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline")


def write_fast_config(path: Path, pipeline: Path, save_dir: Path) -> list[str]:
    """Write an overlay that makes ``--config shapes.yaml`` cheap; returns the arguments of ``fit``."""
    family = {"class_path": "SD3Family", "init_args": {"path": str(pipeline), "max_sequence_length": 0}}
    evaluation = {"scores": [{"class_path": "GenEvalScore"}], "count": 6, "columns": 0, "teacher_steps": 2}
    evaluation["score_teacher"] = False
    config = {
        "trainer": {
            "max_steps": 3,
            "enable_progress_bar": False,
            "log_every_n_steps": 1,
            "logger": {
                "class_path": "TensorBoardLogger",
                "init_args": {"save_dir": str(save_dir), "name": "run", "version": "."},
            },
            "callbacks": [
                {
                    "class_path": "ModelCheckpoint",
                    "init_args": {"every_n_train_steps": 2, "save_last": True, "save_top_k": 0},
                },
                {"class_path": "GradientRewardRecord", "init_args": {"pictures_every": 4, "pictures": 3}},
                {"class_path": "GenerationEvaluation", "init_args": {**evaluation, "every_n_updates": 1000}},
            ],
        },
        "data": {"source": "shapes", "batch_size": 8, "group_size": 4, "shuffle_buffer": 100},
        "model": {
            "init_args": {
                "family": family,
                "reward": {"class_path": "tiny.Brightness"},
                "targets": {"size": 2},
                "matching": {"fake_score_updates": 2},
                "sampler": {"class_path": "ODE"},
            }
        },
    }
    path.write_text(yaml.safe_dump(config))
    return ["--config", "shapes.yaml", "--config", str(path)]


@pytest.fixture
def fast_fit(tmp_path: Path, tiny_pipeline: Path) -> list[str]:
    """Arguments that make ``fit`` on Shapes cheap: three updates of a tiny pipeline, logs in ``tmp_path / "run"``."""
    return write_fast_config(tmp_path / "fast.yaml", tiny_pipeline, tmp_path)


@pytest.fixture(scope="session")
def recorded_run(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline: Path) -> Path:
    """The log directory of one finished run of GDMD, six updates, that tests may read but not change."""
    from gdmd_lightning.configuration import training

    directory = tmp_path_factory.mktemp("recorded")
    arguments = write_fast_config(directory / "fast.yaml", tiny_pipeline, directory)
    changed = ["--model.advantages.score_samples=true", "--model.targets.size=3"]
    training.run([*arguments, *PICTURES, "--trainer.max_steps=6", *changed])
    return directory / "run"
