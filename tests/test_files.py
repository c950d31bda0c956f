"""Atomic writes: the previous version or the new one, never a part of it."""

import errno
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gdmd_lightning.errors import WriteError
from gdmd_lightning.files import (
    atomic_directory,
    atomic_file,
    filled_directory,
    make_directory,
    output_directory,
    temporary_name,
    write_atomically,
)
from gdmd_lightning.methods.checkpointing import WholeCheckpoints


def test_write_atomically_creates_parents_and_replaces_the_file(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "one")
    write_atomically(path, b"two")
    assert path.read_text() == "two"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_atomic_file_keeps_the_previous_version_on_an_error(tmp_path):
    path = tmp_path / "b.txt"
    write_atomically(path, "one")
    with pytest.raises(UnicodeEncodeError), atomic_file(path) as part:
        part.write_text("tw\udc80")  # fails after the file is opened
    assert path.read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_atomic_file_flushes_the_file_before_the_rename_and_the_directory_after_it(tmp_path, monkeypatch):
    done = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.readlink(f"/proc/self/fd/{file}")), flush(file)))
    monkeypatch.setattr(os, "replace", lambda one, other: (done.append("rename"), replace(one, other)))
    write_atomically(tmp_path / "b.txt", "one")
    assert [Path(each).name for each in done] == [temporary_name(tmp_path / "b.txt").name, "rename", tmp_path.name]


KILLED = """
import os, sys, pathlib
from gdmd_lightning.files import atomic_file
with atomic_file(pathlib.Path(sys.argv[1])) as part:
    part.write_text("tw")
    os.kill(os.getpid(), 9)
"""


def test_atomic_file_keeps_the_previous_version_when_killed(tmp_path):
    path = tmp_path / "b.txt"
    write_atomically(path, "one")
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -9
    assert path.read_text() == "one"
    write_atomically(path, "three")
    assert path.read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["b.txt"]


def test_atomic_directory_appears_complete(tmp_path):
    path = tmp_path / "out"
    with atomic_directory(path) as part:
        (part / "a").write_text("1")
        assert not path.exists()
    assert (path / "a").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_atomic_directory_leaves_nothing_on_an_error(tmp_path):
    with pytest.raises(UnicodeEncodeError), atomic_directory(tmp_path / "out") as part:
        (part / "a").write_text("tw\udc80")  # fails after the file is opened
    assert list(tmp_path.iterdir()) == []


def test_atomic_directory_starts_empty_after_a_killed_write(tmp_path):
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "old").write_text("1")
    with atomic_directory(tmp_path / "out") as part:
        assert list(part.iterdir()) == []


def test_atomic_directory_refuses_to_replace_content(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("1")
    with pytest.raises(OSError, match="out"), atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "1"


def test_part_of_another_process_or_person_is_kept(tmp_path):
    host = temporary_name(tmp_path / "x").name.split("@")[1]
    alive, theirs = tmp_path / f"out.{os.getppid()}@{host}", tmp_path / "out.part"
    others = [tmp_path / "out.12@elsewhere.part", tmp_path / f"other.99999999@{host}"]
    dead = tmp_path / f"out.99999999@{host}"
    for path in (alive, theirs, dead, *others):
        path.mkdir(exist_ok=True)
        (path / "content").write_text("1")
    with atomic_directory(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {p.name for p in (alive, theirs, *others)} | {"out"}
    assert all((path / "content").exists() for path in (alive, theirs, *others))


def test_part_of_another_host_is_removed_after_a_day(tmp_path):
    fresh, old, other = (tmp_path / f"{name}@elsewhere.part" for name in ("out.1", "out.2", "other.3"))
    yesterday = time.time() - 25 * 3600
    for path in (fresh, old, other):
        path.write_text("1")
    for path in (old, other):
        os.utime(path, (yesterday, yesterday))
    write_atomically(tmp_path / "out", "2")
    assert {path.name for path in tmp_path.iterdir()} == {"out", fresh.name, other.name}


def test_atomic_file_is_named_when_its_content_is_complete(tmp_path):
    names = ["early"]
    with atomic_file(tmp_path / "part", final=lambda: tmp_path / names[-1]) as part:
        part.write_text("1")
        names.append("late")
    assert [path.name for path in tmp_path.iterdir()] == ["late"]


def fill(directory):
    for name in ("a/file", "last/file", "z/deep/file", "top"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("new")


def test_filled_directory_keeps_other_files_and_completes_its_last_directory_at_the_end(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    for name in ("file", "theirs"):
        (tmp_path / "a" / name).write_text("old")
    seen = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *a: (seen.append((tmp_path / "last").exists()), replace(*a)))
    with filled_directory(tmp_path, last="last") as part:
        fill(part)
        assert not (tmp_path / "z").exists()
    content = {str(p.relative_to(tmp_path)): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    new = dict.fromkeys(("a/file", "last/file", "z/deep/file", "top"), "new")
    assert content == {**new, "a/theirs": "old"}
    assert seen == [False] * 3


def test_filled_directory_has_no_last_one_after_a_failure(tmp_path, monkeypatch):
    real = os.replace

    def full(source, target):
        if "z" in str(target.relative_to(tmp_path)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with (
            pytest.raises(WriteError, match="cannot be written: No space left on device"),
            filled_directory(tmp_path, last="last") as part,
        ):
            fill(part)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "top", "z"}
    with filled_directory(tmp_path, last="last") as part:
        fill(part)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "top", "z", "last"}


def test_output_directory_of_a_command_that_fails_is_removed_unless_it_has_content(tmp_path):
    out = tmp_path / "new" / "out"

    def stopped_in(directory, name=None):
        with output_directory(directory):
            assert directory.is_dir()
            if name:
                (directory / name).write_text("1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped_in(out)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyboardInterrupt):
        stopped_in(tmp_path / "empty")
    with pytest.raises(KeyboardInterrupt):
        stopped_in(out, "result")
    with output_directory(tmp_path / "fine"):
        pass
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {
        "empty",
        "fine",
        "new",
        "new/out",
        "new/out/result",
    }


@pytest.mark.parametrize("name", ["file", "directory"])
def test_failed_write_names_the_path_and_the_cause_and_leaves_nothing(tmp_path, name):
    writer = {"file": atomic_file, "directory": atomic_directory}[name]

    def fill() -> None:
        with writer(tmp_path / "out") as part:
            (part / "a" if name == "directory" else part).write_text("1")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WriteError) as failed:
        fill()
    assert str(failed.value).startswith(f"{tmp_path / 'out'}: cannot be written: No space left on device; ")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_files():
    """A limit on file sizes makes the kernel refuse a write halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_named_when_torch_or_safetensors_write(tmp_path, small_files):
    big = {"x": torch.zeros(100_000)}
    with pytest.raises(WriteError, match=r"/a: cannot be written: File too large; "):
        WholeCheckpoints().save_checkpoint(big, tmp_path / "a")
    with (
        pytest.raises(WriteError, match=r"/b: cannot be written: .*File too large"),
        atomic_file(tmp_path / "b") as part,
    ):
        save_file(big, part)
    assert list(tmp_path.iterdir()) == []


def test_make_directory_checks_that_it_can_be_written(tmp_path):
    make_directory(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="file: cannot be written to: "):
        make_directory(tmp_path / "file")
