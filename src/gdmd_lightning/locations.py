"""Paths of files shipped with the package: ``package:`` paths, and configurations by name."""

from __future__ import annotations

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
        UserError: If it does not exist; the message lists the shipped ones.
    """
    if os.path.isfile(name):  # unlike Path.is_file, no error for a name that is too long
        return name
    shipped = shipped_configs() / name
    if os.path.isfile(shipped):
        return str(shipped)
    names = ", ".join(sorted(str(p.relative_to(shipped_configs())) for p in shipped_configs().rglob("*.yaml")))
    raise UserError(f"no configuration {name!r}", where="--config", remedy=f"give a path, or one of: {names}")
