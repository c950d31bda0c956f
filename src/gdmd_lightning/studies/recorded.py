"""What a directory of results was made with, kept next to them, so that no other settings continue it unnoticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from gdmd_lightning.configuration.suggestions import arguments_of_class
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.methods.resuming import changed_keys, flattened

ANOTHER_OUT = "use another --out"
MOST = 4
"""Settings that an error names: another class of a method changes dozens."""


def record_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write ``settings.json``: plain values by dotted key."""
    write_atomically(settings_of(directory), json.dumps(settings, indent=1) + "\n")


def settings_of(directory: Path) -> Path:
    """The file that :func:`record_settings` writes."""
    return directory / "settings.json"


def check_recorded(
    directory: Path, settings: dict[str, Any], sections: Mapping[str, type], *, where: str, out: Path
) -> None:
    """Fail if what is in a directory was made with other settings; one of an early version records none.

    A setting that a version has added since was at its default.

    Args:
        directory: The directory.
        settings: What it is continued with, by dotted key.
        sections: Classes whose arguments the settings are, by the part of the keys before them. Components have their
            class in the settings.
        where: Whose settings they are, and ``out`` where, for the message.

    Raises:
        UserError: If a setting differs, the message names it with both values; or if the file is damaged.
    """
    path = settings_of(directory)
    if not path.is_file():
        return
    try:
        there = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError("not readable settings", where=str(path), remedy=ANOTHER_OUT) from error
    there = _defaults_of_added(there, settings, sections) | there
    keys = changed_keys(there, settings)
    if keys:
        values = ", ".join(f"{key} is {settings.get(key)!r} (was {there.get(key)!r})" for key in keys[:MOST])
        more = f" and {len(keys) - MOST} more" if len(keys) > MOST else ""
        raise UserError(f"{values}{more} in {out}", where=where, remedy=ANOTHER_OUT)


def _defaults_of_added(there: dict[str, Any], here: dict[str, Any], sections: Mapping[str, type]) -> dict[str, Any]:
    """Defaults of the settings that were not recorded, by key; those of the innermost component that was."""
    owners = {section: f"{kind.__module__}.{kind.__qualname__}" for section, kind in sections.items()}
    owners |= {key.removesuffix(".class_path"): value for key, value in there.items() if here.get(key) == value}
    added = set(here) - set(there)
    found: dict[str, Any] = {}
    for owner in sorted(owners, key=len):  # an inner component's own defaults count, not those for it in an outer one
        within = f"{owner}." if owner else ""
        names = {key.removeprefix(within) for key in added if key.startswith(within)}
        if names:
            defaults = {name: argument.default for name, argument in arguments_of_class(owners[owner]).items()}
            plain = json.loads(json.dumps(defaults, default=_plain))
            found |= {f"{within}{name}": value for name, value in flattened(plain) if name in names}
    return found


def _plain(value: Any) -> Any:
    """A default as a file has it."""
    return value.as_dict() if isinstance(value, Namespace) else str(value)
