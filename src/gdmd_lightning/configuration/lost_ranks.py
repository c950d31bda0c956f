"""A rank that dies takes the others with it, each with one line instead of a page."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LAUNCHER = "GDMD_LIGHTNING_LAUNCHER"
"""Environment variable with the process that runs ``fit``, for those that it starts."""

GONE = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Socket closed",
    "connectFullMesh failed",
    "remote process exited or there was a network error",
)
"""What gloo, torch's store and NCCL say when a process at the other end has ended."""


def is_lost_rank(error: BaseException) -> bool:
    """Whether an error of torch says that another rank has ended."""
    return isinstance(error, RuntimeError) and any(text in str(error) for text in GONE)


@contextmanager
def ending_with_launcher(grace: float = 15.0) -> Iterator[None]:
    """Inside, a rank that Lightning started ends after rank 0, which started it, even if it waits for it forever.

    gloo notices by itself that rank 0 has ended; NCCL can wait for many minutes.

    Args:
        grace: Seconds in which it may end by itself.
    """
    launcher, parent, over = os.environ.get(LAUNCHER), os.getppid(), threading.Event()
    os.environ[LAUNCHER] = str(os.getpid())
    if launcher == str(parent):
        threading.Thread(target=_end_after, args=(parent, over, grace), daemon=True).start()
    try:
        yield
    finally:
        over.set()
        if launcher is None:
            del os.environ[LAUNCHER]
        else:
            os.environ[LAUNCHER] = launcher


def _end_after(parent: int, over: threading.Event, grace: float) -> None:
    while not over.wait(1.0):
        if os.getppid() != parent:
            if not over.wait(grace):
                rank = os.environ.get("LOCAL_RANK", "?")
                print(f"gdmd_lightning: error: rank {rank}: rank 0 has ended", file=sys.stderr, flush=True)
                os._exit(2)
            return
