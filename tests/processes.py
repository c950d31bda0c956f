"""Two processes on this machine, connected by gloo as a launcher would start them."""

import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(script: Path, *arguments: object, ranks: int = 2, timeout: float = 550, check: bool = True):
    """Run a script on each rank; returns their return codes and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    command = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as place:
        files = [Path(place) / str(rank) for rank in range(ranks)]
        environments = [{**os.environ, **shared, "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        started = [_server().Process(target=_rank, args=each) for each in zip([command] * ranks, environments, files)]
        try:
            for each in started:
                each.start()
            _wait(started, timeout)
        finally:
            for each in started:
                each.kill()
                each.join()
        printed = [file.read_text() if file.exists() else "" for file in files]
    codes = [each.exitcode for each in started]
    if check:
        assert codes == [0] * ranks, "\n".join(text[-3000:] for text in printed)
    return codes, printed


def _wait(started: Sequence[BaseProcess], timeout: float) -> None:
    end = time.monotonic() + timeout
    for each in started:
        each.join(max(0, end - time.monotonic()))
        if each.exitcode is None:
            raise TimeoutError(f"a rank still runs after {timeout} s")


@cache
def _server() -> ForkServerContext:
    """A process that has imported the libraries, of which ranks are forks: the imports take longer than their work."""
    # A fixed threshold, so that freed tensors leave the process at once and its memory can be measured.
    own = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    own["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(HERE)])
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["preload"])
        ensure_running()
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
    return context


def _rank(command: Sequence[str], environment: dict[str, str], output: Path) -> None:
    """Run a script in this process as Python would, with another environment and its output in a file."""
    os.environ.clear()
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.path[:0] = [str(Path(command[0]).parent)]
    sys.argv = list(command)
    runpy.run_path(command[0], run_name="__main__")
