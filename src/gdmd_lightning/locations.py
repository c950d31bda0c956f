"""Where things lie that ship with the package: ``package:`` paths and configurations by bare name."""

from __future__ import annotations

from pathlib import Path

from gdmd_lightning.errors import UserError

PACKAGE = Path(__file__).parent


def resolve(path: str) -> str:
    """``package:assets/shapes`` as a path inside the installed package; any other path as it is."""
    return str(PACKAGE / path.removeprefix("package:")) if path.startswith("package:") else path


def shipped_configs() -> Path:
    """The directory of the shipped configurations: in the wheel, or at the root of a checkout."""
    inside = PACKAGE / "configs"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "configs"


def find_config(name: str) -> str:
    """A configuration's path: looked for as given, then among the shipped ones.

    Raises:
        UserError: If there is none, naming those that ship.
    """
    if Path(name).is_file():
        return name
    shipped = shipped_configs() / name
    if shipped.is_file():
        return str(shipped)
    names = ", ".join(sorted(str(p.relative_to(shipped_configs())) for p in shipped_configs().rglob("*.yaml")))
    raise UserError(f"no configuration {name!r}", where="--config", remedy=f"give a path, or one of: {names}")
