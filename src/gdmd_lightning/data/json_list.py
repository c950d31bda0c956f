"""The items of one JSON list, read as a stream: the list may be larger than the memory, and on a single line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from gdmd_lightning.data.lines import LONGEST_LINE, chunks, too_long
from gdmd_lightning.data.rows import broken_json, checked_depth, not_utf8
from gdmd_lightning.errors import UserError

SPACE = re.compile(r"[ \t\r\n]*")
REMEDY = "the file must be one list of strings or of objects, [...]"


def numbered_items(path: str) -> Iterator[tuple[int, Any]]:
    """Every string or object of a list, with the number of the line on which it begins.

    Raises:
        UserError: If the file cannot be read, is not a list of strings or objects, or an item is too long.
    """
    text = _Text(path)
    first = text.next()
    if not first:
        return
    if first != "[":
        raise UserError("not a JSON list", where=text.where, remedy=REMEDY)
    text.at += 1
    if text.next() != "]":
        yield text.line, text.item()
        while text.next() == ",":
            text.at += 1
            text.next()
            yield text.line, text.item()
    if text.next() != "]":
        found = text.next() or "the end of the file"
        raise UserError(f"broken JSON: expected ',' or ']', found {found!r}", where=text.where)
    text.at += 1
    if text.next():
        raise UserError("more text after the list", where=text.where, remedy=REMEDY)


class _Text:
    """The decoded file from a place on; what is before the place is dropped when more is read."""

    def __init__(self, path: str) -> None:
        self.path, self.buffer, self.at, self.line = path, "", 0, 1
        self._pieces = self._decoded()

    @property
    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def _decoded(self) -> Iterator[str]:
        decoder, line = codecs.getincrementaldecoder("utf-8-sig")(), 1
        try:
            for chunk in chunks(self.path):
                yield (piece := decoder.decode(chunk))
                line += piece.count("\n")
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            number = line + error.object[: error.start].count(b"\n")
            raise not_utf8(error.object[error.start], f"{self.path}:{number}") from error

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        piece = next(self._pieces, None)
        self.buffer, self.at = self.buffer[self.at :] + (piece or ""), 0
        return piece is not None

    def _move(self, end: int) -> None:
        self.line += self.buffer.count("\n", self.at, end)
        self.at = end

    def _end_of_space(self, start: int) -> int:
        found = SPACE.match(self.buffer, start)
        return found.end() if found else start

    def next(self) -> str:
        """Move to the next character that is not white space and return it; empty at the end of the file."""
        while True:
            self._move(self._end_of_space(self.at))
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def item(self) -> Any:
        """Parse the string or object that begins here, and move behind it."""
        if self.next() not in ('"', "{"):
            raise UserError("an item is not a string or an object", where=self.where, remedy=REMEDY)
        while True:
            try:
                value, end = _DECODER.raw_decode(self.buffer, self.at)
            except json.JSONDecodeError as error:
                # An item that was not read to its end fails there, within a literal, or as an open string.
                at_end = self._end_of_space(error.pos + len("-Infinity")) >= len(self.buffer)
                whole = not at_end and not error.msg.startswith("Unterminated string")
                if not whole and len(self.buffer) - self.at > LONGEST_LINE:
                    raise too_long(self.where, "item") from error
                offset = error.pos - self.at
                if whole or not self._more():
                    self._move(self.at + offset)
                    raise UserError(f"broken JSON: {error.msg}", where=self.where) from error
            except (ValueError, RecursionError) as error:
                raise broken_json(error, self.where) from error
            else:
                if end - self.at > LONGEST_LINE:
                    raise too_long(self.where, "item")
                checked_depth(value, self.where)
                self._move(end)
                return value


_DECODER = json.JSONDecoder()
