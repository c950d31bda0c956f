"""A rank that dies takes all others with it within a minute, and says so in one line."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import cli_command, cli_environment

from gdmd_lightning.configuration.launching import OWN_STORE
from gdmd_lightning.methods.checkpointing import read_checkpoint

LIMIT = 60
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
LOST = "lost its connection to another rank, which has ended, after 3 updates; see the output of that rank; resume with"


@dataclass(frozen=True)
class End:
    """How a run ended.

    Args:
        status: Exit status of the launching process.
        seconds: From the death of the rank to the end of the last process.
        printed: Standard output and error.
    """

    status: int
    seconds: float
    printed: str


def alive(directory: Path) -> list[int]:
    """Processes in a working directory; torchrun puts its ranks into sessions of their own."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(place / "cwd")) == directory.resolve():
                found.append(int(place.name))
        except OSError:  # it has ended, or is somebody else's
            continue
    return found


@pytest.fixture
def end_of(fast_fit, tmp_path):
    """A function that runs ``fit`` on two ranks, one of which dies after 3 updates, until no process is left."""

    def run(launcher: list[str], *options: str, rank: int = 1, kill: bool = True) -> End:
        overlay = tmp_path / "dying.yaml"
        keeper = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true, save_top_k: 0}}"
        dying = f"{{directory: {tmp_path}, rank: {rank}, kill: {str(kill).lower()}}}"
        overlay.write_text(f"trainer: {{callbacks: [{keeper}, {{class_path: dying.DyingRank, init_args: {dying}}}]}}\n")
        two = ["--trainer.devices=2", "--trainer.max_steps=6", *(options or ("--trainer.strategy=ddp",))]
        fit = cli_command("fit", *fast_fit, "--config", overlay, *two)
        command = [*launcher, *fit[1:]] if launcher else fit
        with (tmp_path / "printed").open("w") as printed:
            began = subprocess.Popen(
                command,
                cwd=tmp_path,
                env={**cli_environment(), OWN_STORE: "1"},
                stdout=printed,
                stderr=printed,
                start_new_session=True,
            )
        try:
            limit = time.time() + 200
            while (began.poll() is None or alive(tmp_path)) and time.time() < limit:
                time.sleep(0.2)
            said = (tmp_path / "printed").read_text()
            assert (tmp_path / "died").exists(), said
            assert alive(tmp_path) == [], said
            seconds = time.time() - (tmp_path / "died").stat().st_mtime
        finally:
            for left in alive(tmp_path):
                os.kill(left, signal.SIGKILL)
        return End(began.wait(10), seconds, said)

    return run


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_other(end_of):
    end = end_of([], kill=False)
    assert end.status != 0
    assert end.seconds < LIMIT
    assert end.printed.count("ZeroDivisionError: this rank dies") == 1
    assert end.printed.count("Traceback") == 1  # of the error itself
    assert end.printed.count(LOST) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_other_with_one_line(end_of, rank):
    end = end_of([], rank=rank)
    assert end.status != 0
    assert end.seconds < LIMIT
    assert "Traceback" not in end.printed
    # Lightning looks every 5 s for processes that it started and that have ended, and may be faster.
    found = end.printed.count(LOST) + end.printed.count("terminated with code -9")
    assert found >= 1 if rank else end.printed.count(LOST) == 1, end.printed


@pytest.mark.slow
def test_a_killed_rank_ends_the_other_under_torchrun(end_of):
    end = end_of(TORCHRUN, rank=0)
    assert end.status != 0
    assert end.seconds < LIMIT
    assert "[rank1]: Traceback" not in end.printed
    assert end.printed.count(LOST) == 1, end.printed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "strategy"),
    [
        (1, ["--trainer.strategy=ddp"]),
        (0, ["--trainer.strategy=ddp"]),
        (0, ["--trainer.strategy.class_path=FSDP2Strategy"]),
        (1, ["--trainer.strategy.class_path=MultiEngineDeepSpeedStrategy", "--trainer.strategy.init_args.stage=3"]),
    ],
)
def test_torchrun_starts_again_from_the_last_checkpoint(end_of, tmp_path, rank, strategy):
    logger = [
        "--trainer.logger=TensorBoardLogger",
        f"--trainer.logger.save_dir={tmp_path}",
        "--trainer.logger.name=run",
    ]
    found = []
    for version in ("broken", "whole"):  # a rank dies once per directory
        options = [*strategy, "--ckpt_path=last_or_new", *logger, f"--trainer.logger.version={version}"]
        end = end_of([*TORCHRUN, "--max_restarts=3"], *options, rank=rank)
        assert end.status == 0, end.printed
        found.append(read_checkpoint(str(tmp_path / "run" / version / "checkpoints/last.ckpt")))
    started = {path.name for path in tmp_path.glob("started-*")}
    assert started == {f"started-{rank}-{updates}" for rank in (0, 1) for updates in (0, 2)}
    for broken, whole in zip(*(each["state_dict"].items() for each in found), strict=True):
        assert torch.equal(broken[1], whole[1]), broken[0]
