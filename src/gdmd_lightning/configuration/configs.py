"""The arguments of ``fit`` that can be checked before anything heavy is imported: configurations and first keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from gdmd_lightning.configuration.messages import shortened
from gdmd_lightning.configuration.suggestions import did_you_mean, nearest
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import find_config

SECTIONS = ("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only")
"""What the keys of ``fit`` start with."""


def with_found_configs(arguments: Sequence[str], sections: Iterable[str] | None = None) -> list[str]:
    """Replace every ``--config NAME`` in the arguments by the path of that configuration.

    Args:
        arguments: Arguments of a command.
        sections: What keys of a configuration may start with; ``None`` for anything.

    Raises:
        UserError: If there is no such configuration, it is not a YAML mapping, or one of its keys starts otherwise.
    """
    out: list[str] = []
    for argument in arguments:
        if out and out[-1] in ("--config", "-c"):
            argument = _checked(find_config(argument), sections)
        elif argument.startswith("--config="):
            argument = f"--config={_checked(find_config(argument.removeprefix('--config=')), sections)}"
        out.append(argument)
    return out


def fit_arguments(arguments: Sequence[str], command: str = "fit") -> list[str]:
    """Check what can be checked of ``fit``'s arguments without importing what they configure.

    Args:
        arguments: As given.
        command: The command whose ``--help`` an error points to.

    Returns:
        The arguments, with configurations found.

    Raises:
        UserError: If a configuration is missing or broken, or an argument starts with no section of ``fit``.
    """
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        option = argument.removeprefix("--").partition("=")[0]
        section = option.partition(".")[0].removesuffix("+")
        if section not in (*SECTIONS, "help", "print_config"):
            meant = nearest(section, SECTIONS)
            hint = f"did you mean '--{meant}'?" if meant else f"options start with --{', --'.join(SECTIONS)};"
            raise UserError(f"unknown option '--{option}'", where=command, remedy=f"{hint} see {command} --help")
    return with_found_configs(arguments, SECTIONS)


def _checked(path: str, sections: Iterable[str] | None) -> str:
    """Return the path if the file holds a YAML mapping; the parser's own message would name no file."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"not a readable YAML file: {shortened(error)}", where=path) from error
    if not isinstance(content, dict):
        remedy = "write 'key: value' lines, as fit --print_config does"
        raise UserError("the file has no keys", where=path, remedy=remedy)
    valid = list(content if sections is None else sections)
    for key in content:
        if key not in valid:
            raise UserError(f"unknown key {str(key)!r}", where=path, remedy=did_you_mean(str(key), valid))
    return path
