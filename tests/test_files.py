"""Atomic writes: the previous version or the new one, never a part of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gdmd_lightning.files import atomic_directory, atomic_file, write_atomically


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
    assert [Path(each).name for each in done] == ["b.txt.part", "rename", tmp_path.name]


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
