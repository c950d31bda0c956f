"""``--config`` by bare name, checked to be readable YAML before a parser gets it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gdmd_lightning.configuration.messages import shortened
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import find_config


def with_found_configs(arguments: Sequence[str]) -> list[str]:
    """Replace every ``--config NAME`` in the arguments by the path of that configuration.

    Raises:
        UserError: If there is no such configuration, or it is not a YAML mapping.
    """
    out: list[str] = []
    for argument in arguments:
        if out and out[-1] in ("--config", "-c"):
            argument = _checked(find_config(argument))
        elif argument.startswith("--config="):
            argument = f"--config={_checked(find_config(argument.removeprefix('--config=')))}"
        out.append(argument)
    return out


def _checked(path: str) -> str:
    """Return the path if the file holds a YAML mapping; the parser's own message would name no file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"not a readable YAML file: {shortened(error)}", where=path) from error
    if not isinstance(content, dict):
        remedy = "write 'key: value' lines, as fit --print_config does"
        raise UserError("the file has no keys", where=path, remedy=remedy)
    return path
