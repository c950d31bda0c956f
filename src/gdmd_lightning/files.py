"""Atomic writes: a file or directory appears under its name complete, or not at all.

Everything is first written next to its final place, on the same file system, and then renamed, which POSIX makes
atomic. A process killed at any time leaves the previous version. At worst a temporary ``NAME.PID@HOST.part`` remains;
the next write of the same name on that host removes it.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gdmd_lightning.errors import UserError, WriteError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to ``path`` on success, remove it on an error.

    Missing parent directories are created. The content is flushed to disk before the rename, and the
    rename after it.

    Raises:
        WriteError: If the disk is full or the place cannot be written.
    """
    part = temporary_name(path)
    with failures_named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            yield part
            with part.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(part, path)
            _sync_directory(path.parent)
        finally:
            _remove(part)


def _sync_directory(path: Path) -> None:
    """Flush a rename to disk, so that files survive a power failure in the order in which they were written."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write bytes, or text as UTF-8, to ``path``; arguments and errors as :func:`atomic_file`."""
    with atomic_file(path) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty temporary directory; rename it to ``path`` on success, remove it on an error.

    Raises:
        WriteError: If the disk is full, the place cannot be written, or ``path`` is a directory with content.
    """
    part = temporary_name(path)
    with failures_named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(path)
            _remove(part)  # of an earlier process with the same number
            part.mkdir()
            yield part
            part.rename(path)
        finally:
            _remove(part)


def make_directory(path: Path) -> None:
    """Create a directory if it is missing, and check that files can be created in it.

    Raises:
        WriteError: If it cannot be created or written to.
    """
    probe = temporary_name(path / "probe")
    with failures_named(path, "cannot be written to"):
        path.mkdir(parents=True, exist_ok=True)
        try:
            probe.touch()
        finally:
            _remove(probe)


def temporary_name(path: Path) -> Path:
    """The name under which this process writes ``path``; no other process uses it."""
    return path.with_name(f"{path.name}.{os.getpid()}@{_host()}.part")


def write_failure(error: BaseException) -> str | None:
    """Why a write failed, or None if the error is not a failed write.

    torch and safetensors report a full disk by errors of their own, sometimes with the real one as the cause.
    """
    chain, seen = [], error
    while seen is not None:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__  # type: ignore[assignment]
    for each in chain:
        if isinstance(each, OSError):
            return each.strerror or str(each)
    for each in chain:
        if type(each).__name__ == "SafetensorError" or "PytorchStreamWriter" in str(each):
            return str(each).split("\n")[0]
    return None


@contextmanager
def failures_named(path: Path, what: str = "cannot be written") -> Iterator[None]:
    """Turn failed writes into errors that name the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = write_failure(error)
        if reason is None:
            raise
        remedy = "free disk space, or give a place that you may write to"
        raise WriteError(f"{what}: {reason}", where=str(path), remedy=remedy) from error


def _host() -> str:
    return re.sub(r"[^\w.-]", "_", platform.node()) or "localhost"


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` whose process on this host has ended."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)@" + re.escape(_host()) + r"\.part")
    for found in path.parent.glob("*.part"):
        matched = pattern.fullmatch(found.name)
        if matched and not _is_running(int(matched[1])):
            _remove(found)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True  # it belongs to another user
    return True


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
