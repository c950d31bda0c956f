"""From bytes to prompts, one row at a time, with errors that name the line or row.

A row that is not blank is never skipped: it is a prompt or an error. Messages count lines and rows from 1.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator
from typing import Any

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt


def numbered_lines(path: str) -> Iterator[tuple[int, bytes]]:
    """Every line of a file with its number, including the line ending, without a byte order mark.

    Raises:
        UserError: If the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=path) from error


def numbered_rows(path: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without surrounding ASCII white space; blank lines are skipped.

    Raises:
        UserError: If the file cannot be read.
    """
    for number, line in numbered_lines(path):
        line = line.strip()
        if line:
            yield number, line


def decoded(line: bytes, where: str) -> str:
    """Decode a line.

    Raises:
        UserError: If the line is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1} of the line)",
            where=where,
            remedy="save the file as UTF-8",
        ) from error


def as_prompt(text: object, where: str, metadata: dict[str, Any] | None = None) -> Prompt:
    """Check a value that should be a prompt's text and make a prompt of it.

    Raises:
        UserError: If the value is not a string, is blank, or cannot be encoded as UTF-8.
    """
    if not isinstance(text, str):
        kind = "missing (null)" if text is None else f"of type {type(text).__name__}"
        raise UserError(f"the prompt is {kind}", where=where, remedy="a prompt must be a non-empty string")
    if not text.strip():
        raise UserError("the prompt is empty", where=where, remedy="a prompt must be a non-empty string")
    try:
        # JSON can contain half a surrogate pair, which no tokenizer accepts. Fail early.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"half a surrogate pair at character {error.start + 1} of the prompt", where=where) from error
    return Prompt(text, {} if metadata is None else metadata)


def no_column(column: str, there: Iterable[object], where: str) -> UserError:
    """Error for a table or an object without the prompt's column."""
    names = ", ".join(repr(name) for name in there) or "none"
    return UserError(
        f"no column {column!r}", where=where, remedy=f"it has {names}; set column to one of them, or rename it"
    )
