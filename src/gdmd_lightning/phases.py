"""Names for the parts of an update, announced by the code that does the work.

Whoever wants to know (the memory planner, a profiler) listens; without a listener an announcement costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

Listener = Callable[[str], AbstractContextManager[object]]

_listener: ContextVar[Listener | None] = ContextVar("phase listener", default=None)


def phase(name: str) -> AbstractContextManager[object]:
    """Announce that what happens inside is the part ``name`` of an update; phases may be nested."""
    listener = _listener.get()
    return nullcontext() if listener is None else listener(name)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener(name)`` is entered for every phase."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)
