"""Messages of libraries that say nothing to a user of this project; each is silenced with its reason."""

from __future__ import annotations

import logging
import re
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass

ADVICE = {
    "LeafSpec": "deprecated name inside torch, called by Lightning",
    "does not have many workers": "prompts are text; workers would cost more than they save",
    "in eval mode": "the frozen teacher is meant to be in evaluation mode",
    "args parameter is intended": "arguments are passed on purpose: fit is called from Python too",
    "with manual optimization": "methods step their own optimizers",
    "call of `lr_scheduler.step": "an update whose first step is skipped",
    "dirpath has changed from": "a run that continues elsewhere keeps its own best checkpoints; nothing is lost",
    "`list` across ranks is zero": "a run that trains has no validation batches; callbacks evaluate",
    "TPU available but not used": "the accelerator is in the configuration",
    "GPU available but not used": "the accelerator is in the configuration",
}
"""Warnings by a part of their text."""
STATUS = {
    "Tip:": "advertises other products",
    "GPU available: ": "the first lines of a run say which device it uses",
    "TPU available: ": "the first lines of a run say which device it uses",
    "Setting accelerator to CPU": "DeepSpeed, of a run that may not use it; the first lines of a run say the device",
    "Seed set to ": "the seed is in config.yaml",
    "`Trainer.fit` stopped: `max_steps=": "the last lines of a run say how many updates it made",
    "Restoring states from the checkpoint path": "the first lines of a run say from which update it continues",
    "Restored all states from the checkpoint": "the first lines of a run say from which update it continues",
}
"""Log messages of Lightning and DeepSpeed by how they begin, except "Tip:", which follows a symbol."""
SOURCES = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
    "lightning.fabric.utilities.seed",
    "DeepSpeed",
)


def is_noise(record: logging.LogRecord) -> bool:
    """Whether a log record is in :data:`STATUS`."""
    message = re.sub(r"^\[rank: \d+\] ", "", record.getMessage())
    return "Tip:" in message or message.startswith(tuple(STATUS))


def passes(record: logging.LogRecord) -> bool:
    """A filter of loggers; one function, so that repeated calls of :func:`quiet` add it once."""
    return not is_noise(record)


@dataclass(frozen=True)
class WithoutLogWriters:
    """A ``threading.excepthook`` that says nothing about the thread that writes TensorBoard's files.

    What fails there is raised in the main thread by the logger's next call, which warns once.
    """

    before: Callable[[threading.ExceptHookArgs], object]

    def __call__(self, failure: threading.ExceptHookArgs, /) -> None:
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self.before(failure)


def quiet() -> None:
    """Silence the messages listed here, and only those."""
    if not isinstance(threading.excepthook, WithoutLogWriters):
        threading.excepthook = WithoutLogWriters(threading.excepthook)
    for message in ADVICE:
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    for name in SOURCES:
        logging.getLogger(name).addFilter(passes)
