"""Numbers with their ranges: a setting declares ``steps: Count``, and ``@ranged`` refuses what is outside.

A type checker and the command line's help see the plain ``int`` or ``float``. NaN and infinity are in no range.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from numbers import Integral, Real
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from gdmd_lightning.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """Finite numbers from ``low`` to ``high``.

    Args:
        low, high: The ends, infinite for no limit.
        above: Whether ``low`` itself is outside.
        below: Whether ``high`` itself is outside.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __contains__(self, value: Any) -> bool:
        low = value > self.low if self.above else value >= self.low
        high = value < self.high if self.below else value <= self.high
        return math.isfinite(value) and low and high

    def describe(self, kind: str) -> str:
        """The range in words, of an ``integer`` or a ``number``."""
        if math.isinf(self.low):
            return f"a finite {kind}"
        article = "an" if kind == "integer" else "a"
        if math.isinf(self.high):
            return f"{article} {kind} {'above' if self.above else 'of at least'} {self.low}"
        return f"{article} {kind} in {'(' if self.above else '['}{self.low}, {self.high}{')' if self.below else ']'}"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # as NumPy and Lightning limit theirs
Steps = Annotated[int, Range(1, 1000)]  # a teacher's schedule has 1000 timesteps
Finite = Annotated[float, Range()]
Positive = Annotated[float, Range(0, above=True)]
NonNegative = Annotated[float, Range(0)]
Fraction = Annotated[float, Range(0, 1)]
Decay = Annotated[float, Range(0, 1, below=True)]
OpenLow = Annotated[float, Range(0, 1, above=True)]
OpenFraction = Annotated[float, Range(0, 1, above=True, below=True)]


def check_number(key: str, hint: Any, value: Any) -> None:
    """Check a value, or every element of a list or tuple, against the range in its type hint.

    Args:
        key: Name of the setting, for the message.
        hint: A type hint; one without a range accepts everything. ``None`` is left to the hint's ``| None``.
        value: What was given.

    Raises:
        UserError: If a number is outside of its range, or is not a number.
    """
    if value is None:
        return
    arguments = get_args(hint)
    limits = next((each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Range)), None)
    if limits is not None:
        kind, number = ("integer", Integral) if arguments[0] is int else ("number", Real)
        if isinstance(value, bool) or not isinstance(value, number) or value not in limits:
            raise UserError(f"it is {value!r}", where=key, remedy=f"use {limits.describe(kind)}")
    elif get_origin(hint) in (list, tuple):
        alike = get_origin(hint) is list or Ellipsis in arguments
        for one, each in zip(arguments[:1] * len(value) if alike else arguments, value):
            check_number(key, one, each)
    else:
        for alternative in arguments:
            check_number(key, alternative, value)


def ranged(kind: type[T]) -> type[T]:
    """Class decorator: before anything else, the constructor checks the arguments whose type has a range.

    Raises:
        UserError: From the constructor, if an argument is out of range.
    """
    build: Callable[..., None] = kind.__init__
    names = list(inspect.signature(build).parameters)[1:]

    @functools.wraps(build)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        own: Any = type(self)
        for name, value in {**dict(zip(names, args)), **kwargs}.items():
            check_number(f"{own.__name__}.{name}", ranges_of(own).get(name), value)
        build(self, *args, **kwargs)

    checked.__ranged__ = True  # type: ignore[attr-defined]
    kind.__init__ = checked  # type: ignore[method-assign]
    return kind


@functools.cache
def ranges_of(kind: type) -> dict[str, Any]:
    """Type hints of a class's settings, with their ranges: those of its ``@ranged`` constructor and of its bases."""
    if is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        return {field.name: hints[field.name] for field in fields(kind)}
    found: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        build = vars(base).get("__init__")
        if hasattr(build, "__ranged__"):
            found |= get_type_hints(build, include_extras=True)
    return found
