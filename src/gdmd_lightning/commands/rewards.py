"""List the rewards, and for each whether its weights are on this machine; nothing is downloaded."""

from __future__ import annotations

import argparse
from pathlib import Path

from gdmd_lightning.errors import UserError


def main(arguments: list[str]) -> int:
    """``rewards [--directory DIR ...]``."""
    parser = argparse.ArgumentParser(prog="gdmd_lightning rewards", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--directory",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="look for weights here too: DIR/HUB_ID/FILE, or DIR/FILE if one model alone has a file of that name; "
        "may be given several times",
    )
    options = parser.parse_args(arguments)
    for directory in options.directory:
        if not directory.is_dir():
            raise UserError("there is no such directory", where=f"--directory {directory}")
    from gdmd_lightning.rewards.catalog import REWARDS

    for entry in REWARDS:
        gradient = "differentiable" if entry.differentiable else "not differentiable"
        print(f"{entry.name}: {entry.scores}; {gradient}; license: {entry.license}")
        for line in entry.state(tuple(options.directory)):
            print(f"  {line}")
    return 0
