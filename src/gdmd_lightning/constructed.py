"""Objects that remember how they were constructed, and the configuration that constructs them again."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import PurePath
from typing import Any

from gdmd_lightning.described import Described


class Constructed:
    """Base of what :func:`configuration_of` constructs again: it keeps the arguments of its constructor."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = _remembering(cls.__init__)  # type: ignore[method-assign]


def _remembering(build: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(build)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> None:
        if "_constructed_with" not in vars(self):  # else a subclass keeps its own
            object.__setattr__(self, "_constructed_with", _named(build, self, *args, **kwargs))
        build(self, *args, **kwargs)

    return remembering


def _named(build: Callable[..., None], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a constructor by name, with its own defaults; none if they do not fit it."""
    signature = inspect.signature(build)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError:
        return {}  # the constructor says it better
    bound.apply_defaults()
    _, *given = bound.arguments.items()
    found: dict[str, Any] = {}
    for name, value in given:
        found |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return found


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
