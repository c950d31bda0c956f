"""``--config`` by bare name, seen to be readable before a parser gets it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from gdmd_lightning.commands.complaints import shortened
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import find_config


def with_found_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments with every ``--config NAME`` replaced by the path of that configuration."""
    out: list[str] = []
    for argument in arguments:
        if out and out[-1] in ("--config", "-c"):
            argument = _readable(find_config(argument))
        elif argument.startswith("--config="):
            argument = f"--config={_readable(find_config(argument.removeprefix('--config=')))}"
        out.append(argument)
    return out


def _readable(path: str) -> str:
    """The path, seen to hold YAML: the parser's own message names no file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"not a readable YAML file: {shortened(error)}", where=path) from error
    if not isinstance(content, dict):
        raise UserError("it holds no keys", where=path, remedy="write 'key: value' lines, as fit --print_config does")
    return path
