"""Processes that read ahead survive the signals that stop a run: training needs their batches to finish its update."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading


def outlive_signals(worker: int) -> None:
    """Ignore the signals that stop a run, which often reach the whole group of processes; runs in a loader's worker.

    SIGTERM by the training process still ends it: that is how torch ends a worker that is late at the end of a run.

    Args:
        worker: Number of the worker.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    training = multiprocessing.parent_process()
    if training is not None and hasattr(signal, "sigwaitinfo"):  # not on macOS, where SIGTERM keeps its effect
        # A handler would not see who sent it. Threads that start later block it too.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_training, args=(training.pid,), daemon=True).start()


def _end_with_training(training: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != training:
        pass
    os._exit(0)
