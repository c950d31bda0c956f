"""A log, record or picture that cannot be written costs a warning, not the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from gdmd_lightning.files import write_failure


@contextmanager
def warn_if_not_written() -> Iterator[None]:
    """Turn a failed write into a warning."""
    try:
        yield
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        rank_zero_warn(f"the run goes on without a file: {error if isinstance(error, OSError) else reason}")


def tolerate_failed_writes(logger: Logger) -> None:
    """Make a logger warn once, and then drop what it is given, when its files cannot be written."""
    failed = False

    def tolerant(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal failed
            try:
                return None if failed else method(*args, **kwargs)
            except Exception as error:
                reason = write_failure(error)
                if reason is None:
                    raise
                failed = True
                rank_zero_warn(f"{type(logger).__name__} stops logging, and the run goes on: {reason}")
            return None

        return wrapped

    for name in ("log_metrics", "log_hyperparams", "save", "finalize"):
        setattr(logger, name, tolerant(getattr(logger, name)))
