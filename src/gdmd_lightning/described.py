"""The settings of a reward, detector or answering model as plain values."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

WITHOUT_EFFECT = ("batch_size",)
"""Settings that do not change a score."""


class Described:
    """Base of what :func:`described` knows by its settings: it remembers the arguments of its constructor.

    They are described before the constructor runs, since what it makes of them may be loaded or changed later.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = remembering(cls.__init__, "_arguments", described)  # type: ignore[method-assign]


def remembering(build: Callable[..., None], attribute: str, kept: Callable[[Any], Any]) -> Callable[..., None]:
    """A constructor that first keeps its arguments by name, with its own defaults, in an attribute of the object.

    Args:
        build: The constructor.
        attribute: Where they are kept, as a dictionary; empty if they do not fit the constructor.
        kept: What is kept of each.
    """

    @functools.wraps(build)
    def remembered(self: Any, *args: Any, **kwargs: Any) -> None:
        if attribute not in vars(self):  # else a subclass keeps its own
            given = _named(build, self, *args, **kwargs)
            object.__setattr__(self, attribute, {name: kept(value) for name, value in given.items()})
        build(self, *args, **kwargs)

    return remembered


def _named(build: Callable[..., None], /, *args: Any, **kwargs: Any) -> dict[str, Any]:
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


def described(value: Any) -> Any:
    """A value as JSON can write it: of an object with settings, its class, public attributes and other arguments.

    Arguments that are no public attribute, or one that is known only by its class, enter as a digest: what is private
    is written nowhere. Weights are known by their path. What is neither a plain value nor an object with settings is
    known by its class.
    """
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, PurePath | torch.dtype):
        return str(value)
    if isinstance(value, bytes | complex | range):
        return repr(value)
    if isinstance(value, re.Pattern):
        return [described(value.pattern), value.flags]
    if isinstance(value, Tensor | np.ndarray | np.generic):
        return _of_numbers(value)
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted((described(each) for each in value), key=_as_text)
    if isinstance(value, Mapping):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, type | FunctionType | BuiltinFunctionType):
        return f"{value.__module__}.{value.__qualname__}"
    name = type(value).__qualname__
    if not (isinstance(value, Described) or is_dataclass(value)):
        return name
    # Detectors have their rules on the class.
    owners = [vars(kind) for kind in inspect.getmro(type(value))] + [getattr(value, "__dict__", {})]
    public = {key for owner in owners for key, each in owner.items() if key[0] != "_" and not _is_code(each)}
    lazy = {key for owner in owners for key, each in owner.items() if isinstance(each, functools.cached_property)}
    attributes = {key: getattr(value, key) for key in sorted(public - lazy - set(WITHOUT_EFFECT))}
    found = {key: described(each) for key, each in attributes.items()}
    arguments = getattr(value, "_arguments", {})
    if is_dataclass(value):
        arguments = {field.name: described(getattr(value, field.name)) for field in fields(value) if field.init}
    shown = {key for key, each in attributes.items() if found[key] not in (None, type(each).__qualname__)}
    shown |= {key for key, value in arguments.items() if key in found and found[key] == value}
    others = {key: value for key, value in arguments.items() if key not in shown and key not in WITHOUT_EFFECT}
    digest = {"arguments": _digest(_as_text(others).encode())} if others else {}
    return {"class": name, **found, **digest}


def described_digest(value: Any) -> str:
    """Digest of :func:`described`, for where the settings themselves should not be written."""
    return _digest(_as_text(described(value)).encode())


def arguments_digest(value: Described) -> str | None:
    """Digest of the arguments of an object's constructor; ``None`` if it has none."""
    arguments = getattr(value, "_arguments", {})
    return _digest(_as_text(arguments).encode()) if arguments else None


def _of_numbers(value: Any) -> Any:
    """A tensor or array by its type, shape and content; a tensor without memory by the first two."""
    if isinstance(value, Tensor):
        kind, shape = str(value.dtype), list(value.shape)
        if value.is_meta:
            return [kind, shape]
        value = value.detach().to_dense() if value.layout != torch.strided else value.detach()
        content = value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    else:
        kind, shape = str(value.dtype), list(value.shape)
        content = repr(value.tolist()).encode() if value.dtype.hasobject else value.tobytes()
    return [kind, shape, _digest(content)]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_code(value: Any) -> bool:
    return isinstance(value, FunctionType | property | classmethod | staticmethod)
