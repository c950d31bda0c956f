"""Objects that remember how they were constructed, and the configuration that constructs them again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from gdmd_lightning.described import Described, remembering


class Constructed:
    """Base of what :func:`configuration_of` constructs again: it keeps the arguments of its constructor."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = remembering(cls.__init__, "_constructed_with", _as_given)  # type: ignore[method-assign]


def _as_given(value: Any) -> Any:
    return value


def configuration_of(value: Any) -> Any:
    """What a configuration file has for a value: plain values, with class and arguments for an object.

    A reward has its class only: commands restore a generator without it.

    Raises:
        ValueError: If no configuration can have it; the message says why.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return [configuration_of(each) for each in value]
    if isinstance(value, Mapping):
        return {str(key): configuration_of(each) for key, each in value.items()}
    kind = type(value)
    path = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, Described):
        return {"class_path": path}
    if is_dataclass(value):
        arguments = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
    elif isinstance(value, Constructed):
        arguments = vars(value).get("_constructed_with", {})
    else:
        raise ValueError(f"a {kind.__qualname__} is no setting")
    settings = configuration_of(arguments)
    if is_dataclass(value) and kind.__bases__ == (object,):
        return settings  # no choice between classes, so a configuration does not name this one
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        raise ValueError(f"the class {kind.__qualname__} cannot be imported; put it into a module of its own")
    return {"class_path": path, "init_args": settings}
