"""Atomic writes: a file or directory appears under its name complete, or not at all.

Everything is first written next to its final place, on the same file system, and then renamed, which POSIX makes
atomic. A process killed at any time leaves the previous version; at worst a ``.part`` remains, which the next write
of the same name replaces.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to ``path`` on success, remove it on an error.

    Missing parent directories are created. The content is flushed to disk before the rename, and the
    rename after it.

    Raises:
        OSError: If the disk is full or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
        _sync_directory(path.parent)
    finally:
        part.unlink(missing_ok=True)


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
        OSError: If the disk is full, the place cannot be written, or ``path`` is a directory with content.
    """
    part = path.with_name(path.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        part.rename(path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
