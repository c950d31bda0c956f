"""What a directory of results was made with, kept next to them, so that no other settings continue it unnoticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gdmd_lightning.errors import UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.methods.resuming import changed_keys

ANOTHER_OUT = "use another --out"
MOST = 4
"""Settings that an error names: another class of a method changes dozens."""


def record_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Write ``settings.json``: plain values by dotted key."""
    write_atomically(settings_of(directory), json.dumps(settings, indent=1) + "\n")


def settings_of(directory: Path) -> Path:
    """The file that :func:`record_settings` writes."""
    return directory / "settings.json"


def check_recorded(directory: Path, settings: dict[str, Any], *, where: str, out: Path) -> None:
    """Fail if what is in a directory was made with other settings; one of an earlier version records none.

    Args:
        directory: The directory.
        settings: What it is continued with, by dotted key.
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
    keys = changed_keys(there, settings)
    if keys:
        values = ", ".join(f"{key} is {settings.get(key)!r} (was {there.get(key)!r})" for key in keys[:MOST])
        more = f" and {len(keys) - MOST} more" if len(keys) > MOST else ""
        raise UserError(f"{values}{more} in {out}", where=where, remedy=ANOTHER_OUT)
