"""From a file to numbered lines: regular files only, plain or gzip, with lines of bounded length.

Nothing here holds more than one line and one chunk in memory, whatever the file contains, so that neither a device,
nor a compressed bomb, nor a file without line breaks can fill the memory. Lines end with a line feed, a carriage
return, or both, as in Python's text files.
"""

from __future__ import annotations

import codecs
import gzip
import os
import stat
import zlib
from collections.abc import Iterator

from gdmd_lightning.errors import UserError

CHUNK = 1 << 16
"""Bytes read at once."""

LONGEST_LINE = 1_000_000
"""Bytes of a line or, where lines do not matter, of a row with all its columns."""

_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def check_regular(path: str) -> None:
    """Check that a path leads to a regular file, without opening it: opening a pipe would wait for a writer.

    Raises:
        UserError: If it does not exist, cannot be reached, or is not a regular file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise UserError("no such file", where=path, remedy="give the path of an existing prompt file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise UserError(f"cannot be read: {_reason(error)}", where=path, remedy="give another path") from error
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise UserError(f"{kind}, not a file", where=path, remedy="write the prompts to a regular file")


def chunks(path: str) -> Iterator[bytes]:
    """The content of a regular file, piece by piece; of a ``.gz`` file, the decompressed content.

    Raises:
        UserError: If the file cannot be read, or is not complete gzip.
    """
    check_regular(path)
    line = 1
    try:
        with open(path, "rb") as file:
            content = gzip.GzipFile(fileobj=file) if path.lower().endswith(".gz") else file
            while chunk := content.read(CHUNK):
                yield chunk
                line += chunk.count(b"\n")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        what = f"broken gzip: {_reason(error)}"
        raise UserError(what, where=f"{path}:{line}", remedy="compress or copy the file again") from error
    except OSError as error:
        raise UserError(f"cannot be read: {_reason(error)}", where=path) from error


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Every line with its number from 1, including its line ending, without a byte order mark.

    Raises:
        UserError: As :func:`chunks`, and if a line is longer than :data:`LONGEST_LINE`.
    """
    complete, rest = 0, b""
    for chunk in chunks(path):
        lines = (rest + chunk).splitlines(keepends=True)
        # The last line may go on, and its "\r" may be the first half of "\r\n".
        rest = lines.pop()
        for number, line in enumerate(lines, complete + 1):
            yield number, _checked(line, number, path)
        complete += len(lines)
        _checked(rest, complete + 1, path)
    if rest:
        yield complete + 1, _checked(rest, complete + 1, path)


def too_long(where: str, of: str = "line") -> UserError:
    """Error for a line or row beyond :data:`LONGEST_LINE`."""
    return UserError(
        f"the {of} has more than {LONGEST_LINE:,} bytes", where=where, remedy="write each prompt on its own line"
    )


def _checked(line: bytes, number: int, path: str) -> bytes:
    if len(line) > LONGEST_LINE:
        raise too_long(f"{path}:{number}")
    return line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
