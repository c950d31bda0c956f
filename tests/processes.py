"""Two processes on this machine, connected by gloo as a launcher would start them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def run_ranks(script: Path, *arguments: object, ranks: int = 2, timeout: float = 550, check: bool = True):
    """Run a script on each rank; returns their return codes and what they printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = [os.environ.get("PYTHONPATH", ""), str(HERE), str(script.parent)]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
    # A fixed threshold, so that freed tensors leave the process at once and its memory can be measured.
    shared |= {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(script), *map(str, arguments)]
    started = [
        subprocess.Popen(
            command, env={**os.environ, **shared, "LOCAL_RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    try:
        printed = [each.communicate(timeout=timeout)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    codes = [each.returncode for each in started]
    if check:
        assert codes == [0] * ranks, "\n".join(text[-3000:] for text in printed)
    return codes, printed
