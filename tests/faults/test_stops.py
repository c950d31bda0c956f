"""Every early stop is saved and reported, and no status says that the run is complete."""

import os
import signal
from pathlib import Path

import pytest
from test_interruption import differing

from gdmd_lightning.callbacks.interruption import StopOnSignal
from gdmd_lightning.cli import main
from gdmd_lightning.methods.checkpointing import WholeCheckpoints, read_checkpoint


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return stop.value.code


def stopping(call: int = 2, number: int = 0, rank: int = 0) -> list[str]:
    options = {"call": call, "number": number, "rank": rank}
    return ["--model.reward=stopping.StopIn", *(f"--model.reward.{key}={value}" for key, value in options.items())]


def step_of(path) -> int:
    return read_checkpoint(str(path), in_memory=False)["global_step"]


def test_hangup_during_training_saves_and_ends_with_its_status(fast_fit, tmp_path, capsys):
    """As SIGINT and SIGTERM, which ``test_interruption.py`` sends to a process."""
    number = int(signal.SIGHUP)
    assert status("fit", *fast_fit, *stopping(1, number)) == 128 + number
    checkpoints = tmp_path / "run" / "checkpoints"
    sentence = f"stopped by signal {number} after 1 updates; resume with --ckpt_path {checkpoints}/interrupted.ckpt"
    assert capsys.readouterr().out.strip() == sentence
    assert [step_of(checkpoints / name) for name in ("interrupted.ckpt", "last.ckpt")] == [1, 1]


@pytest.fixture
def slurm(monkeypatch):
    """The environment that ``srun`` gives to the only task of a job."""
    numbers = {"NTASKS": 1, "JOB_ID": 12345, "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in {"JOB_NAME": "train", **numbers}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))


def test_warning_of_slurm_saves_a_whole_update_and_no_file_of_lightning(fast_fit, tmp_path, slurm):
    before = signal.getsignal(signal.SIGUSR1)
    assert status("fit", *fast_fit, f"--trainer.default_root_dir={tmp_path}", *stopping(1, signal.SIGUSR1)) == 138
    assert step_of(tmp_path / "run" / "checkpoints" / "interrupted.ckpt") == 1
    assert not list(tmp_path.rglob("hpc_ckpt*"))
    assert signal.getsignal(signal.SIGUSR1) == before


def test_checkpoint_of_lightnings_requeue_is_not_taken_unasked(complaint, fast_fit, tmp_path, slurm):
    left = tmp_path / "hpc_ckpt_1.ckpt"
    left.touch()
    line = complaint("fit", *fast_fit, f"--trainer.default_root_dir={tmp_path}")
    assert line.startswith(f"{left}: Lightning saved it in the middle of an update, ")


def test_checkpoint_of_a_signal_knows_the_best_one_of_the_same_update(fast_fit, tmp_path):
    keeper = "{class_path: ModelCheckpoint, init_args: {monitor: loss, every_n_train_steps: 1}}"
    assert status("fit", *fast_fit, f"--trainer.callbacks=[{keeper}]", *stopping(1, signal.SIGTERM)) == 143
    checkpoints = tmp_path / "run" / "checkpoints"
    states = read_checkpoint(str(checkpoints / "interrupted.ckpt"), in_memory=False)["callbacks"].values()
    (best,) = (Path(state["best_model_path"]) for state in states if "best_model_path" in state)
    assert best.parent == checkpoints
    assert step_of(best) == 1


def test_signal_stops_a_run_that_has_not_reached_its_least_number_of_updates(fast_fit, tmp_path):
    assert status("fit", *fast_fit, "--trainer.min_steps=3", *stopping(1, signal.SIGTERM)) == 143
    assert step_of(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1


def test_signal_that_comes_twice_at_once_is_one_stop_and_a_later_one_ends_at_once(monkeypatch):
    now = 100.0
    monkeypatch.setattr("gdmd_lightning.callbacks.interruption.time.monotonic", lambda: now)
    stop = StopOnSignal()
    stop._receive(signal.SIGINT, None)
    now = 100.9
    stop._receive(signal.SIGTERM, None)
    assert stop.received == signal.SIGINT
    now = 101.1
    with pytest.raises(SystemExit) as ended:
        stop._receive(signal.SIGTERM, None)
    assert ended.value.code == 143


def test_signal_while_the_last_checkpoint_is_written_loses_nothing(fast_fit, tmp_path, capsys, monkeypatch):
    real = WholeCheckpoints.save_checkpoint

    def interrupted(self, checkpoint, path, storage_options=None):
        os.kill(os.getpid(), signal.SIGINT)
        real(self, checkpoint, path, storage_options)

    monkeypatch.setattr(WholeCheckpoints, "save_checkpoint", interrupted)
    assert status("fit", *fast_fit, "--trainer.max_steps=1") == 130
    assert step_of(tmp_path / "run" / "checkpoints" / "last.ckpt") == 1
    assert "signal 2 came with the last update; the run is complete" in capsys.readouterr().out


def test_sys_exit_in_a_reward_is_an_error(complaint, fast_fit):
    line = complaint("fit", *fast_fit, *stopping(2))
    assert line.startswith("fit: the run was ended by sys.exit(0) after 1 updates; ")


@pytest.mark.parametrize(("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGHUP, "SIGHUP"), (2, "SIGINT")])
def test_signal_outside_of_training_ends_a_command_with_its_status(tmp_path, monkeypatch, capsys, number, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gdmd_lightning.commands.demo.demo", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    assert status("demo") == 128 + number
    assert capsys.readouterr().err == f"demo was stopped by signal {int(number)} ({name})\n"
    assert signal.getsignal(signal.SIGTERM) == before
    assert not list(tmp_path.rglob(".lock"))


def test_signal_during_a_training_of_demo_ends_it_with_the_status_of_the_signal(fast_fit, tmp_path, monkeypatch):
    from gdmd_lightning.studies.arms import Arm

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Arm, "arguments", property(lambda _: [*fast_fit, *stopping(1, signal.SIGTERM)]))
    assert status("demo", "--out=out", "--count=12") == 143
    assert step_of(tmp_path / "out" / "dmd" / "checkpoints" / "last.ckpt") == 1


def test_demo_refuses_a_directory_of_somebody_else(complaint, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    assert complaint("demo", "--out=.").startswith(".: it has files that demo did not write, such as notes.txt; ")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("strategy", ["ddp_spawn", pytest.param("ddp_notebook", marks=pytest.mark.slow)])
def test_strategies_that_spawn_are_refused_before_training(complaint, fast_fit, tmp_path, strategy):
    line = complaint("fit", *fast_fit, "--trainer.devices=2", f"--trainer.strategy={strategy}")
    assert line.startswith(f"trainer.strategy: '{strategy}' ")
    assert line.endswith("; use ddp")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def evaluated(fast_fit, tmp_path, monkeypatch):
    """A function that runs three updates, with evaluations in three batches after the second and at the end."""
    scores = "[{class_path: RewardScore, init_args: {reward: {class_path: stopping.StopAt}}}]"
    options = "every_n_updates: 2, count: 6, batch_size: 2, columns: 0, score_teacher: false"
    evaluation = f"{{class_path: GenerationEvaluation, init_args: {{scores: {scores}, {options}}}}}"
    last = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 3, save_last: true, save_top_k: 0}}"
    best = "{monitor: eval/stopping/overall, every_n_train_steps: 2, filename: best, save_top_k: 1}"
    keeper = f"{{class_path: ModelCheckpoint, init_args: {best}}}"
    callbacks = f"--trainer.callbacks=[{evaluation}, {last}, {keeper}]"

    def run(name: str, *arguments: str, at: dict[int, int]) -> tuple[int, int, Path]:
        """Status, calls of the reward, and directory of a run that is stopped at these calls."""
        monkeypatch.setattr("stopping.at", at)
        monkeypatch.setattr("stopping.calls", calls := [])
        to = f"--trainer.logger.init_args.save_dir={tmp_path / name}"
        try:
            main(["fit", *fast_fit, callbacks, to, *arguments])
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, len(calls), tmp_path / name / "run"

    return run


def test_signal_in_an_evaluation_saves_at_once_and_the_resumed_run_finishes_the_update(evaluated, tmp_path):
    code, calls, alone = evaluated("alone", at={})
    assert (code, calls) == (0, 6)
    code, calls, run = evaluated("stopped", at={1: int(signal.SIGTERM), 3: 0})
    assert (code, calls) == (1, 3)
    interrupted = run / "checkpoints" / "interrupted.ckpt"
    assert step_of(interrupted) == 2
    assert not (run / "checkpoints" / "best.ckpt").exists()
    code, calls, _ = evaluated("stopped", f"--ckpt_path={interrupted}", at={})
    assert (code, calls) == (0, 1 + 3)
    best = run / "checkpoints" / "best.ckpt"
    assert step_of(best) == 2
    assert differing(run / "checkpoints" / "last.ckpt", alone / "checkpoints" / "last.ckpt") == []
    code, calls, again = evaluated("again", f"--ckpt_path={best}", at={})
    assert (code, calls) == (0, 3)
    assert differing(again / "checkpoints" / "last.ckpt", alone / "checkpoints" / "last.ckpt") == []


def test_signal_in_an_evaluation_that_ends_in_time_saves_after_the_update_too(evaluated):
    code, calls, run = evaluated("stopped", at={1: int(signal.SIGTERM)})
    assert (code, calls) == (143, 3)
    code, calls, _ = evaluated("stopped", f"--ckpt_path={run / 'checkpoints' / 'interrupted.ckpt'}", at={})
    assert (code, calls) == (0, 3)
