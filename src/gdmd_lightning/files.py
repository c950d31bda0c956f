"""Atomic writes: a file or directory appears under its name complete, or not at all. Digests of what was written.

Everything is first written next to its final place, on the same file system, and then renamed, which POSIX makes
atomic. A process killed at any time leaves the previous version. At worst a temporary ``NAME.PID@HOST.part`` remains;
the next write of the same name removes it: at once on that host, after a day on another, where it may be in use.
"""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gdmd_lightning.errors import UserError, WriteError

DAY = 24 * 3600


@contextmanager
def atomic_file(path: Path, final: Callable[[], Path] | None = None, *, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to ``path`` on success, remove it on an error.

    Missing parent directories are created. The content is flushed to disk before the rename, and the
    rename after it.

    Args:
        path: The file.
        final: Where the name depends on when the content is complete: called then, it gives a name in the same
            directory that is used instead of ``path``.
        flush: Whether the file must survive a power failure, and what killed processes left is removed. One of
            thousands of small files that can be made again need not, and is written ten times as fast.

    Raises:
        WriteError: If the disk is full or the place cannot be written.
    """
    part = temporary_name(path)
    with failures_named(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if flush:
                remove_leftovers(path)
            yield part
            if flush:
                with part.open("rb+") as file:
                    os.fsync(file.fileno())
            os.replace(part, path if final is None else final())
            if flush:
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


def write_atomically(path: Path, content: bytes | str, *, flush: bool = True) -> None:
    """Write bytes, or text as UTF-8, to ``path``; arguments and errors as :func:`atomic_file`."""
    with atomic_file(path, flush=flush) as part:
        part.write_bytes(content.encode() if isinstance(content, str) else content)


def append_lines(path: Path, content: bytes) -> None:
    """Add lines to a file, all or none; a missing file is created, a missing directory is not.

    If the last line is not complete, as a killed process may leave it, it is ended first.

    Raises:
        WriteError: If the disk is full or the place cannot be written.
    """
    with failures_named(path), path.open("a+b", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(before - 1)
            content = content if file.read(1) == b"\n" else b"\n" + content
        try:
            if (written := file.write(content)) != len(content):
                raise OSError(errno.ENOSPC, f"only {written} of {len(content)} bytes fit")
        except OSError:
            file.truncate(before)
            raise


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
            remove_leftovers(path)
            _remove(part)  # of an earlier process with the same number
            part.mkdir()
            yield part
            part.rename(path)
        finally:
            _remove(part)


@contextmanager
def filled_directory(path: Path, last: str) -> Iterator[Path]:
    """Yield an empty temporary directory; on success move its files into ``path``, its directory ``last`` at the end.

    Files in ``path`` with the same names are replaced one by one, others stay. So ``path / last``, which must not
    exist before, exists only if all the rest is there.

    Raises:
        WriteError: If the disk is full or the place cannot be written.
    """
    with failures_named(path):
        part = temporary_name(path / last)
        try:
            path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path / last)
            _remove(part)
            part.mkdir()
            yield part
            for file in sorted(file for file in part.rglob("*") if file.is_file()):
                place = file.relative_to(part)
                if place.parts[0] != last:
                    (path / place).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(file, path / place)
            (part / last).rename(path / last)
        finally:
            _remove(part)


@contextmanager
def output_directory(path: Path) -> Iterator[None]:
    """Create the directory of a command's output; if the command fails before it writes anything, remove it again.

    Raises:
        WriteError: If it cannot be created or written to.
    """
    missing = [each for each in (path, *path.parents) if not os.path.lexists(each)]
    try:
        make_directory(path)
        yield
    except BaseException:
        for each in missing:
            with suppress(OSError):  # it has content, or was never created
                each.rmdir()
        raise


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


def files_digest(directory: Path, files: Iterable[Path]) -> str:
    """Digest of files below a directory: their names in it, their sizes and every byte, in any order of ``files``.

    It reads everything: a few seconds for 8 GB on one core.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(files):
        digest.update(f"{file.relative_to(directory)} {file.stat().st_size}".encode())
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "blake2b").digest())
    return digest.hexdigest()


def temporary_name(path: Path) -> Path:
    """The name under which this process writes ``path``; no other process uses it."""
    return path.with_name(f"{path.name}.{os.getpid()}@{_host()}.part")


def remove_leftovers(path: Path) -> None:
    """Remove temporary files of ``path`` whose process on this host has ended, or that are of another host and old."""
    pattern = re.compile(re.escape(path.name) + r"\.(\d+)@(.+)\.part")
    for found in path.parent.glob("*.part"):
        matched = pattern.fullmatch(found.name)
        if matched and _is_left(found, int(matched[1]), matched[2]):
            _remove(found)


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


def _is_left(part: Path, process: int, host: str) -> bool:
    if host == _host():
        return not _is_running(process)
    with suppress(FileNotFoundError):
        return time.time() - part.stat().st_mtime > DAY
    return False


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
