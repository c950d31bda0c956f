"""From bytes to prompts, one row at a time, with errors that name the line or row.

A row that is not blank is never skipped: it is a prompt or an error. Messages count lines and rows from 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

from gdmd_lightning.data.lines import numbered_lines
from gdmd_lightning.errors import UserError, listed
from gdmd_lightning.prompts import Prompt

LONGEST_PROMPT = 10_000
"""Characters of a prompt. No text encoder takes as many, and an unclosed quote soon reaches them."""

DEEPEST = 50
"""Levels of lists and objects inside each other; beyond some hundreds JSON cannot be written again."""


def numbered_rows(path: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines without surrounding ASCII white space; blank lines are skipped.

    Raises:
        UserError: As :func:`numbered_lines`.
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
        raise not_utf8(line[error.start], where, f" at position {error.start + 1} of the line") from error


def not_utf8(byte: int, where: str, place: str = "") -> UserError:
    """Error for a byte that is not UTF-8."""
    return UserError(f"not UTF-8 (byte 0x{byte:02x}{place})", where=where, remedy="save the file as UTF-8")


def parsed(line: bytes, where: str) -> Any:
    """Parse a line of JSON.

    Raises:
        UserError: If it is not JSON, or is nested too deeply.
    """
    text = decoded(line, where)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise broken_json(error, where) from error
    return checked_depth(value, where)


def broken_json(error: ValueError | RecursionError, where: str) -> UserError:
    """Error for text that Python's JSON parser refuses."""
    if isinstance(error, json.JSONDecodeError):
        return UserError(f"broken JSON at column {error.colno}: {error.msg}", where=where)
    if isinstance(error, RecursionError):
        return _too_deep(where)
    # Python refuses to convert integers of thousands of digits, since that takes quadratic time.
    return UserError("a number has too many digits", where=where, remedy="write it as a string, or remove it")


def checked_depth(value: Any, where: str) -> Any:
    """The value itself.

    Raises:
        UserError: If it has more than :data:`DEEPEST` levels.
    """
    level, values = 0, [value]
    while values := [inner for outer in values for inner in _inside(outer)]:
        level += 1
        if level > DEEPEST:
            raise _too_deep(where)
    return value


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _too_deep(where: str) -> UserError:
    what = f"more than {DEEPEST} lists or objects inside each other"
    return UserError(what, where=where, remedy="write one object with the prompt and its metadata")


def as_prompt(text: object, where: str, metadata: dict[str, Any] | None = None) -> Prompt:
    """Check a value that should be a prompt's text and make a prompt of it.

    Raises:
        UserError: If the value is not a string, is blank, is longer than :data:`LONGEST_PROMPT`, has a NUL, or cannot
            be encoded as UTF-8.
    """
    if not isinstance(text, str):
        kind = "missing (null)" if text is None else f"of type {type(text).__name__}"
        raise UserError(f"the prompt is {kind}", where=where, remedy="a prompt must be a non-empty string")
    if not text.strip():
        raise UserError("the prompt is empty", where=where, remedy="a prompt must be a non-empty string")
    if len(text) > LONGEST_PROMPT:
        most = f"a prompt may have {LONGEST_PROMPT:,}"
        raise UserError(f"the prompt has {len(text):,} characters", where=where, remedy=most)
    if "\0" in text:
        what = f"a NUL at character {text.index(chr(0)) + 1} of the prompt"
        raise UserError(what, where=where, remedy="save the file as UTF-8 text")
    try:
        # JSON can contain half a surrogate pair, which no tokenizer accepts. Fail early.
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"half a surrogate pair at character {error.start + 1} of the prompt", where=where) from error
    return Prompt(text, {} if metadata is None else metadata)


def object_as_prompt(row: dict[str, Any], column: str, where: str, tag: str | None = None) -> Prompt:
    """Make a prompt of a JSON object; the whole object becomes its metadata, as GenEval's files need.

    Args:
        row: The object.
        column: Key of the prompt.
        where: File and line, for messages.
        tag: Key of the value that becomes the metadata's ``tag``; ``None`` to leave the metadata as it is.

    Raises:
        UserError: If it lacks a key, or as :func:`as_prompt` and :func:`with_tag`.
    """
    check_columns(row, column, tag, where)
    return as_prompt(row[column], where, row if tag is None else with_tag(row[tag], where, row))


def with_tag(value: object, where: str, metadata: dict[str, Any] | None = None) -> dict[str, Any]:
    """Metadata with the tag by which scores are reported.

    Raises:
        UserError: If the tag is not a string or an integer, or is blank.
    """
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        remedy = "each row needs a name or a number there; set tag to another column, or leave it out"
        raise UserError(f"the tag is {value!r}", where=where, remedy=remedy)
    return {**(metadata or {}), "tag": str(value).strip()}


def check_columns(there: Iterable[object], column: str, tag: str | None, where: str) -> None:
    """Check that a table or an object has the prompt's column and that of the tag, if there is one, once each.

    Raises:
        UserError: If it does not.
    """
    names = list(there)
    for setting, wanted in (("column", column), ("tag", tag)):
        if wanted is not None and wanted not in names:
            remedy = f"it has {listed(names)}; set {setting} to one of them, or rename it"
            raise UserError(f"no column {wanted!r}", where=where, remedy=remedy)
        if names.count(wanted) > 1:
            raise UserError(f"{names.count(wanted)} columns {wanted!r}", where=where, remedy="rename all but one")
