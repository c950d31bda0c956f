"""What a checkpoint's configuration may cause: only the package's own classes run, and nothing is downloaded.

A configuration names classes, and building them runs their modules. A configuration file is the user's own; that in a
checkpoint may be a stranger's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import _common, set_parsing_settings

from gdmd_lightning.configuration.messages import shortened
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import resolve
from gdmd_lightning.methods.provenance import parsed

OWN = "gdmd_lightning"
WITHOUT_REWARD = {"class_path": "gdmd_lightning.rewards.base._AbsentReward"}


@contextmanager
def only_classes_of(trusted: Sequence[str]) -> Iterator[None]:
    """Inside, a value that names a class is imported only from the package itself and from ``trusted``.

    Args:
        trusted: Modules, packages or classes, such as ``my_package`` or ``my_package.Darkness``.

    Raises:
        UserError: If an entry of ``trusted`` is not a name.
    """
    # jsonargparse has no public way to take entries back.
    before = dict(_common.parsing_settings)
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[OWN, *trusted])
    except ValueError as error:
        raise UserError(shortened(error), where="--trust", remedy="name packages or classes") from error
    try:
        yield
    finally:
        _common.parsing_settings.update(before)


def denied_class(text: str) -> str | None:
    """The class that :func:`only_classes_of` denied according to a parser's error, if it is one of those errors."""
    found = re.search(r"Importing '([^']+)' is not allowed", text)
    return found[1] if found else None


def read_configuration(text: str, path: str) -> dict[str, Any]:
    """Parse the configuration in a checkpoint.

    Args:
        text: The configuration, as YAML.
        path: The checkpoint, for messages.

    Returns:
        ``class_path`` and ``init_args`` of its ``model``, as plain values.

    Raises:
        UserError: If it is not a configuration of this project.
    """
    found = parsed(text)
    model = found.get("model") if isinstance(found, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("init_args"), dict):
        raise UserError(f"the configuration in {path!r} has no model", where="checkpoint")
    return model


def check_places(model: dict[str, Any]) -> None:
    """Fail if a ``path`` in a checkpoint's configuration is not here: a hub id is downloaded only if a user gives it.

    Raises:
        UserError: If it exists neither here nor inside the package.
    """
    for key, path in _paths(model["init_args"], ""):
        if not (isinstance(path, str) and Path(resolve(path)).expanduser().exists()):
            teacher = key == "family.path"
            remedy = "give its directory, or a hub id to download it: --teacher PATH" if teacher else "restore it"
            raise UserError(f"{path!r}, named by the checkpoint, does not exist here", where=key, remedy=remedy)


def _paths(settings: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(settings, list):
        for each in settings:
            yield from _paths(each, at)
    elif isinstance(settings, dict):
        for name, value in settings.items():
            here = at if name == "init_args" else f"{at}.{name}".removeprefix(".")
            if name == "path":
                yield here, value
            else:
                yield from _paths(value, here)
