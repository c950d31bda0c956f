"""The options of every command that loads a checkpoint."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def add_loading_options(parser: ArgumentParser) -> None:
    """Add the options of every command that loads a checkpoint: ``--teacher`` and ``--trust``."""
    parser.add_argument(
        "--teacher",
        type=str | None,
        default=None,
        help="pipeline directory, or hub id to download; default: the directory that the checkpoint names",
    )
    parser.add_argument(
        "--trust",
        type=str,
        action="append",
        default=[],
        help="package, module or class besides this package's own that the checkpoint may run; may be repeated",
    )
