"""A rank that waits for others that have ended ends too."""

import os
import subprocess
import sys
import time

import pytest

from gdmd_lightning.configuration.lost_ranks import LAUNCHER, ending_with_launcher, is_lost_rank

RANK = """
import subprocess, sys, time
from gdmd_lightning.configuration.lost_ranks import ending_with_launcher
with ending_with_launcher(grace=0.5):
    if {starts}:
        print(subprocess.Popen([sys.executable, "-c", sys.argv[1], "waits"]).pid, flush=True)
    if "waits" in sys.argv:
        print("waiting", flush=True)
        time.sleep(60)
"""


def test_a_waiting_rank_ends_after_the_process_that_started_it():
    rank_1 = RANK.format(starts=False)
    rank_0 = subprocess.Popen(
        [sys.executable, "-c", RANK.format(starts=True), rank_1, "waits"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "LOCAL_RANK": "1"},
    )  # fmt: skip
    try:
        lines = [rank_0.stdout.readline() for _ in range(3)]  # the process of rank 1, and both are waiting
        rank_0.kill()
        began = time.monotonic()
        _, said = rank_0.communicate(timeout=30)  # rank 1 holds the pipe until it ends
    finally:
        rank_0.kill()
    assert sum(line == "waiting\n" for line in lines) == 2
    assert time.monotonic() - began < 20
    assert said == "gdmd_lightning: error: rank 1: rank 0 has ended\n"


def test_launcher_variable_is_gone_after_the_run():
    with ending_with_launcher():
        assert os.environ[LAUNCHER] == str(os.getpid())
    assert LAUNCHER not in os.environ


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[pair.cc:561] Connection closed by peer [127.0.0.1]:12208. This is typically"), True),
        (RuntimeError("Gloo connectFullMesh failed with [pair.cc:152] timed out connecting: SO_ERROR"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_lost_ranks_are_told_from_other_errors(error, expected):
    assert is_lost_rank(error) is expected
