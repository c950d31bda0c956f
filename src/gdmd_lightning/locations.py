"""Paths of files shipped with the package: ``package:`` paths, and configurations by name."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from gdmd_lightning.errors import UserError

PACKAGE = Path(__file__).parent


def resolve(path: str) -> str:
    """Turn ``package:assets/shapes`` into a path inside the installed package; other paths stay unchanged."""
    return str(PACKAGE / path.removeprefix("package:")) if path.startswith("package:") else path


def shipped_configs() -> Path:
    """Directory of the shipped configurations: inside an installed wheel, or at the root of a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "configs"


def find_config(name: str) -> str:
    """Find a configuration: first as a path, then by name among the shipped ones.

    Raises:
        UserError: If it does not exist; the message names the shipped one that was probably meant, or all.
    """
    if os.path.isfile(name):  # unlike Path.is_file, no error for a name that is too long
        return name
    shipped = shipped_configs() / name
    if os.path.isfile(shipped):
        return str(shipped)
    names = sorted(str(p.relative_to(shipped_configs())) for p in shipped_configs().rglob("*.yaml"))
    near = difflib.get_close_matches(name, names, n=1)
    remedy = f"did you mean {near[0]!r}?" if near else f"give a path, or one of: {', '.join(names)}"
    raise UserError(f"no configuration {name!r}", where="--config", remedy=remedy)
