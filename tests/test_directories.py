"""Directories of one process or one command: what somebody else wrote is never deleted."""

import json
import subprocess
import sys

import pytest

from gdmd_lightning.directories import MARK, DirectoryLock, claim
from gdmd_lightning.errors import UserError


def test_lock_is_released_by_the_end_of_a_killed_process(tmp_path):
    code = (
        "import os, sys, pathlib; from gdmd_lightning.directories import DirectoryLock\n"
        "lock = DirectoryLock(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=rf"another run writes to this directory \(process {process.pid} on "):
            DirectoryLock(tmp_path)
    finally:
        process.kill()
        process.communicate()
    DirectoryLock(tmp_path).release()


def test_released_lock_leaves_nothing_and_keeps_content(tmp_path):
    for content in (False, True):
        lock = DirectoryLock(tmp_path / "a")
        if content:
            (tmp_path / "a" / "b").write_text("1")
        lock.release()
        assert [path.name for path in tmp_path.rglob("*")] == (["a", "b"] if content else [])


def test_claim_replaces_only_what_the_command_wrote(tmp_path):
    claim(tmp_path / "out", "demo", ("a", "b"))
    (tmp_path / "out" / "a").mkdir()
    (tmp_path / "out" / "a" / "old").write_text("1")
    (tmp_path / "out" / "b").write_text("1")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    claim(tmp_path / "out", "demo", ("a", "b"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MARK, "notes.txt"}


@pytest.mark.parametrize(
    "mark",
    [
        None,
        "{",
        "[]",
        json.dumps({"program": "gdmd_lightning", "command": "results", "entries": ["a"]}),
        json.dumps({"program": "other", "command": "demo", "entries": ["a"]}),
        json.dumps({"program": "gdmd_lightning", "command": "demo", "entries": ["a", "../kept"]}),
        json.dumps({"program": "gdmd_lightning", "command": "demo", "entries": ["a", ".."]}),
        json.dumps({"program": "gdmd_lightning", "command": "demo", "entries": ["a", ""]}),
        json.dumps({"program": "gdmd_lightning", "command": "demo", "entries": []}),
    ],
)
def test_claim_refuses_what_it_cannot_prove_to_be_its_own(tmp_path, mark):
    (tmp_path / "kept").write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("mine")
    if mark is not None:
        (out / MARK).write_text(mark)
    with pytest.raises(UserError, match="out: it has files that demo did not write, such as "):
        claim(out, "demo", ("a",))
    assert (out / "a").read_text() == (tmp_path / "kept").read_text() == "mine"
