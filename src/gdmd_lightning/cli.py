"""The command line: runs a command, and reports a user's mistake in one line.

Nothing heavy is imported until the command is known, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from gdmd_lightning import __version__
from gdmd_lightning.errors import StoppedBySignal, UserError, WriteError
from gdmd_lightning.garbage import collect_rarely

COMMANDS = {
    "fit": "train a generator: fit --config shapes.yaml [--trainer.max_steps 50 ...]",
    "plan": "estimate what fit needs per GPU, without downloads: plan --config shapes.yaml [--gpu_memory 24 ...]",
    "evaluate": "score the teacher and checkpoints on fixed prompts",
    "compare": "compare methods over seeds at equal network evaluations: compare --config compare_shapes.yaml",
    "sample": "generate pictures of prompts: sample CHECKPOINT PROMPTS OUT [--per_prompt 4 ...]",
    "consolidate": "write the plain checkpoint of one in shards: consolidate CHECKPOINT OUT",
    "export": "write a checkpoint's generator as a diffusers pipeline directory",
    "demo": "distill the embedded teacher with DMD, then GDMD, and print a table of scores",
    "rewards": "list the rewards, and whether their weights are on this machine",
    "pretrain": "train the embedded Shapes teacher from scratch",
}


def usage() -> str:
    """The text of ``--help``."""
    rows = "\n".join(f"  {name:<11} {what}" for name, what in COMMANDS.items())
    return (
        "usage: python -m gdmd_lightning COMMAND [options]\n\n"
        "Distill text-to-image diffusion models into few-step generators, with gradient rewards.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  --help     show this text; COMMAND --help shows the options of a command\n"
        "  --version  show the version\n"
        "  --debug    show the traceback of an error\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; exit with status 2 after a user's mistake, and with 128 + N after signal N."""
    if argv is None and not sys.flags.safe_path and os.getcwd() not in sys.path:
        # As with "python -m": a configuration can name a class in the working directory.
        sys.path.insert(0, os.getcwd())
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(f"gdmd_lightning {__version__}")
        return
    name = arguments[0]
    try:
        if name not in COMMANDS:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"use one of: {', '.join(COMMANDS)}"
            raise UserError(f"unknown command {name!r}", remedy=meant)
        # Silence banners and loading progress of other libraries.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # diffusers warns of parts that a pipeline may lack, and of scheduler settings that its own classes wrote.
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        collect_rarely()
        with _signals_raise():
            status = importlib.import_module(f"gdmd_lightning.commands.{name}").main(arguments[1:])
    except (UserError, argparse.ArgumentError, OSError) as error:
        if debug or (isinstance(error, OSError) and not _names_a_file(error)):
            raise
        print(f"gdmd_lightning: error: {_readable(error, name)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, StoppedBySignal) else signal.SIGINT
        print(f"{name} was stopped by signal {int(number)} ({signal.Signals(number).name})", file=sys.stderr)
        sys.exit(128 + number)
    if status:
        sys.exit(status)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does: temporary files are removed on the way out."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise StoppedBySignal(number)

    in_main = threading.current_thread() is threading.main_thread()
    numbers = [signal.SIGTERM, signal.SIGHUP] if in_main else []  # Python allows handlers in the main thread only
    # A signal that the caller ignores or handles stays so: nohup ignores SIGHUP.
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _names_a_file(error: OSError) -> bool:
    """Whether an error of the system is about a file, such as one on a full disk, and not about a network."""
    return isinstance(error, WriteError) or (error.errno is not None and isinstance(error.filename, str))


def _readable(error: Exception, command: str) -> Exception:
    """The error as one line for a person."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return UserError(f"{error.strerror}", where=str(error.filename))
    from gdmd_lightning.configuration.messages import readable_error

    return readable_error(error, command)
