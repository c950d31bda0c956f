"""On a full disk, a checkpoint that fails ends the run in one line; a record, picture or log only warns."""

import errno
import os
import warnings

import pytest
import yaml
from conftest import PICTURES, REFUSAL

from gdmd_lightning.cli import main
from gdmd_lightning.configuration import training
from gdmd_lightning.errors import WriteError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.studies.arms import Arm


@pytest.fixture
def full(monkeypatch):
    """``full("name")`` makes every write of a file of that name fail."""
    real = os.replace

    def fill(word: str) -> None:
        def replace(source, target):
            if word in str(target):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(source, target)

        monkeypatch.setattr(os, "replace", replace)

    return fill


@pytest.mark.parametrize("name", ["last.ckpt", "config.yaml"])
def test_checkpoint_or_configuration_that_cannot_be_written_is_one_line(fast_fit, tmp_path, capsys, full, name):
    full(name)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *fast_fit, "--trainer.max_steps=1"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{REFUSAL}{tmp_path / 'run'}/")
    assert f"{name}: cannot be written: No space left on device; " in last
    assert not list(tmp_path.rglob("*.part"))
    assert not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize("name", [".parquet", pytest.param("pictures-", marks=pytest.mark.slow), ".png"])
def test_record_or_picture_that_cannot_be_written_warns_and_the_run_goes_on(fast_fit, tmp_path, full, name):
    full(name)
    with pytest.warns(UserWarning, match="the run goes on without a file: .*No space left on device"):
        training.run([*fast_fit, *PICTURES, "--trainer.max_steps=2"])
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(str(last), in_memory=False)["global_step"] == 2
    assert not [path for path in tmp_path.rglob("*") if name in path.name or path.suffix == ".part"]


@pytest.fixture
def broken_log(monkeypatch):
    """``broken_log(n)`` makes all writes of TensorBoard fail after the first ``n``."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    real, calls = RecordWriter.write, []

    def limit(count: int) -> None:
        def write(self, data):
            calls.append(data)
            if len(calls) > count:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            real(self, data)

        monkeypatch.setattr(RecordWriter, "write", write)

    return limit


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_logger_that_cannot_write_warns_once_and_the_run_goes_on(fast_fit, tmp_path, broken_log):
    broken_log(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        training.run([*fast_fit, "--trainer.max_steps=3"])
    told = [str(w.message) for w in said if "stops logging" in str(w.message)]
    assert told == ["TensorBoardLogger stops logging, and the run goes on: No space left on device"]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert read_checkpoint(str(last), in_memory=False)["global_step"] == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_logger_that_cannot_start_is_one_line(fast_fit, tmp_path, broken_log):
    broken_log(0)
    with pytest.raises(WriteError, match=f"^{tmp_path / 'run'}.*: cannot be written: No space left on device; "):
        training.run([*fast_fit, "--trainer.max_steps=1"])


@pytest.mark.parametrize("command", [["evaluate"], ["compare", "--config=compare_shapes.yaml"], ["demo"], ["pretrain"]])
def test_directory_that_cannot_be_written_is_refused_before_any_work(complaint, tmp_path, monkeypatch, command):
    monkeypatch.setattr(Arm, "check", lambda *_: None)  # compare parses its methods before
    (tmp_path / "file").write_text("")
    line = complaint(*command, "--out=file/out")
    assert line.startswith("file/out: cannot be written")
    assert "Not a directory" in line


def test_log_places_its_directory_in_the_message(complaint, fast_fit, tmp_path):
    (tmp_path / "file").write_text("")
    config = tmp_path / "place.yaml"
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "file"), "name": "x"}}
    config.write_text(yaml.safe_dump({"trainer": {"logger": logger}}))
    line = complaint("fit", *fast_fit, "--config", config)
    assert line.startswith(f"{tmp_path / 'file' / 'x'}: cannot be written: ")
