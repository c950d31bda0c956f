"""The command line: runs a command, and reports a user's mistake in one line.

Nothing heavy is imported until the command is known, so that ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from gdmd_lightning import __version__
from gdmd_lightning.errors import UserError

COMMANDS = {
    "fit": "train a generator: fit --config shapes.yaml [--trainer.max_steps 50 ...]",
    "plan": "estimate what fit needs per GPU, without downloads: plan --config shapes.yaml [--gpu_memory 24 ...]",
    "evaluate": "score the teacher and checkpoints on fixed prompts",
    "compare": "compare methods over seeds at equal network evaluations: compare --config compare_shapes.yaml",
    "sample": "generate pictures of prompts: sample CHECKPOINT PROMPTS OUT [--per_prompt 4 ...]",
    "export": "write a checkpoint's generator as a diffusers pipeline directory",
    "demo": "distill the embedded teacher with DMD, then GDMD, and print a table of scores",
    "pretrain": "train the embedded Shapes teacher from scratch",
}


def usage() -> str:
    """The text of ``--help``."""
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
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
            raise UserError(f"unknown command {name!r}", remedy=f"use one of: {', '.join(COMMANDS)}")
        # Silence banners and loading progress of other libraries.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        status = importlib.import_module(f"gdmd_lightning.commands.{name}").main(arguments[1:])
    except (UserError, argparse.ArgumentError) as error:
        if debug:
            raise
        if not isinstance(error, UserError):
            from gdmd_lightning.configuration.messages import readable_error

            error = readable_error(error, name)
        print(f"gdmd_lightning: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    if status:
        sys.exit(status)
