"""Names for the parts of an update, announced by the code that does the work.

Whoever wants to know (the logs, the memory planner, a profiler) listens; without a listener an announcement costs
nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar

Listener = Callable[[str], AbstractContextManager[object]]

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("phase listeners", default=())


def phase(name: str) -> AbstractContextManager[object]:
    """Announce that what happens inside is the part ``name`` of an update; phases may be nested."""
    listeners = _listeners.get()
    return _entered(listeners, name) if listeners else nullcontext()


@contextmanager
def _entered(listeners: tuple[Listener, ...], name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for listener in listeners:
            stack.enter_context(listener(name))
        yield


class Stopwatch:
    """A listener that adds up the seconds of the host in each phase, without those of the phases inside it.

    Work on a GPU is queued, so its time shows in the phase that waits for it.

    Attributes:
        seconds: Seconds by phase.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside = [0.0]

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        self._inside.append(0.0)
        try:
            yield
        finally:
            whole = time.perf_counter() - began
            own = whole - self._inside.pop()
            self._inside[-1] += whole
            self.seconds[name] = self.seconds.get(name, 0.0) + own


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Inside, ``listener(name)`` is entered for every phase, after those of the listeners that are there already."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
