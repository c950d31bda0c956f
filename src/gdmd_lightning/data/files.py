"""Prompt files: one small class per format, each streaming from any row (see ``readers.PromptSource``)."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from gdmd_lightning.data.json_list import numbered_items
from gdmd_lightning.data.lines import LONGEST_LINE, check_regular, numbered_lines, too_long
from gdmd_lightning.data.rows import (
    LONGEST_PROMPT,
    as_prompt,
    check_columns,
    decoded,
    numbered_rows,
    object_as_prompt,
    parsed,
    with_tag,
)
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 1024
"""Rows decoded at once: enough for little overhead, few enough for the first prompt to come quickly."""

TAG_OF_FILE = "file"
"""As ``tag``: the name of a prompt's file, without its suffixes."""

_CLOSED_TOO_EARLY = re.compile(r'(?:^|\t)"(?:[^"\t]|"")*"[^"\t\r\n]')
"""A field that begins with a quote and has more text after the closing one: text with quotes, not quoted text."""


@dataclass(frozen=True)
class TextFile:
    """One prompt per line; white space around it is removed."""

    name: str

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for number, line in islice(numbered_rows(self.name), start, None):
            where = f"{self.name}:{number}"
            yield as_prompt(decoded(line, where), where)

    def count(self) -> int:
        """Number of lines that are not blank."""
        return sum(1 for _ in numbered_rows(self.name))


@dataclass(frozen=True)
class JsonLines:
    """One JSON object per line."""

    name: str
    column: str = "prompt"
    tag: str | None = None

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for number, line in islice(numbered_rows(self.name), start, None):
            where = f"{self.name}:{number}"
            row = parsed(line, where)
            if not isinstance(row, dict):
                raise UserError(f"a JSON {type(row).__name__}", where=where, remedy="each line must be an object")
            yield object_as_prompt(row, self.column, where, self.tag)

    def count(self) -> int:
        """Number of lines that are not blank."""
        return sum(1 for _ in numbered_rows(self.name))


@dataclass(frozen=True)
class JsonList:
    """One JSON list whose items are strings, or objects as in :class:`JsonLines`."""

    name: str
    column: str = "prompt"
    tag: str | None = None

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for number, item in islice(numbered_items(self.name), start, None):
            where = f"{self.name}:{number}"
            if isinstance(item, dict):
                yield object_as_prompt(item, self.column, where, self.tag)
            elif self.tag is None:
                yield as_prompt(item, where)
            else:
                raise UserError(f"a string, which has no {self.tag!r}", where=where, remedy=NO_COLUMNS)

    def count(self) -> int:
        """Number of items."""
        return sum(1 for _ in numbered_items(self.name))


@dataclass(frozen=True)
class Table:
    """Columns of a comma- or tab-separated file whose first record holds the column names.

    A line of a tab-separated file that has text behind a closing quote, and a field for each column, is taken as it is,
    quotes and all: PartiPrompts has such prompts.
    """

    name: str
    column: str = "prompt"
    delimiter: str = ","
    tag: str | None = None

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record with the number of its last line; empty lines are skipped."""
        first, size = 1, 0  # of the record that is being read
        width = 0  # of the header

        def lines() -> Iterator[str]:
            nonlocal size
            for number, line in numbered_lines(self.name):
                begins = size == 0
                size += len(line)
                if size > LONGEST_LINE:
                    raise too_long(f"{self.name}:{first}", "record")
                text = decoded(line, f"{self.name}:{number}")
                literal = begins and self.delimiter == "\t" and text.count("\t") + 1 == width
                yield quoted(text) if literal and _CLOSED_TOO_EARLY.search(text) else text

        # Without strict, an unclosed quote would turn the rest of the file into one prompt.
        records = csv.reader(lines(), strict=True, delimiter=self.delimiter)
        try:
            for record in records:
                if record:
                    width = width or len(record)
                    yield records.line_num, record
                first, size = records.line_num + 1, 0
        except csv.Error as error:
            kind = "CSV" if self.delimiter == "," else "TSV"
            raise UserError(f"broken {kind}: {error}", where=f"{self.name}:{records.line_num}") from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        records = self._records()
        for line, header in islice(records, 1):
            check_columns(header, self.column, self.tag, f"{self.name}:{line}")
            index = header.index(self.column)
            tag = None if self.tag is None else header.index(self.tag)
            for number, record in islice(records, start, None):
                where = f"{self.name}:{number}"
                if len(record) != len(header):
                    separator = "comma" if self.delimiter == "," else "tab"
                    raise UserError(
                        f"{len(record)} fields where the header has {len(header)}",
                        where=where,
                        remedy=f'put prompts that contain a {separator} in "double quotes"',
                    )
                yield as_prompt(record[index], where, None if tag is None else with_tag(record[tag], where))

    def count(self) -> int:
        """Number of records below the header."""
        return max(sum(1 for _ in self._records()) - 1, 0)


def quoted(line: str) -> str:
    """A tab-separated line of literal fields, in quotes for the CSV parser."""
    fields = line.rstrip("\r\n").split("\t")
    return "\t".join('"' + field.replace('"', '""') + '"' for field in fields) + "\n"


@dataclass(frozen=True)
class ParquetTable:
    """Columns of a parquet file; row groups before the start are skipped by the file's metadata."""

    name: str
    column: str = "prompt"
    tag: str | None = None

    @contextmanager
    def _open(self, as_dictionary: tuple[str, ...] = ()) -> Iterator[ParquetFile]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        check_regular(self.name)
        try:
            # With a buffer a column is streamed; without one, a row group's whole column is kept in memory.
            with ParquetFile(self.name, buffer_size=1 << 20, read_dictionary=as_dictionary) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"not a readable parquet file: {error}", where=self.name) from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        with self._open() as file:
            check_columns(file.schema_arrow.names, self.column, self.tag, self.name)
            plain = any(file.schema.column(i).path == self.column for i in range(len(file.schema)))
        # As a dictionary, a long value that many rows share is in memory once.
        with self._open((self.column,) if plain else ()) as file:
            row, group = 0, 0
            while group < file.num_row_groups and row + file.metadata.row_group(group).num_rows <= start:
                row += file.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, file.num_row_groups))
            for one in groups:
                self._check_size(file, one)
            # Without threads: they would not survive the fork of a data loader's worker.
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=self._columns, use_threads=False):
                unwanted = min(max(start - row, 0), batch.num_rows)
                for number in range(unwanted, batch.num_rows):
                    where = f"{self.name}:row {row + number + 1}"
                    try:
                        text, *tags = [batch.column(name)[number].as_py() for name in self._columns]
                    except UnicodeDecodeError as error:
                        raise UserError("not UTF-8", where=where) from error
                    yield as_prompt(text, where, with_tag(tags[0], where) if tags else None)
                row += batch.num_rows

    @property
    def _columns(self) -> list[str]:
        return [self.column] if self.tag is None else [self.column, self.tag]

    def _check_size(self, file: ParquetFile, number: int) -> None:
        """Refuse a row group whose prompts are longer than allowed on average, before decompressing it."""
        group = file.metadata.row_group(number)
        for i in range(group.num_columns):
            column = group.column(i)
            # At most 4 bytes per character; 1 MB for headers of pages.
            if column.path_in_schema in self._columns and (
                column.total_uncompressed_size > 4 * LONGEST_PROMPT * group.num_rows + 1_000_000
            ):
                raise UserError(
                    f"{column.total_uncompressed_size:,} bytes for {group.num_rows:,} prompts",
                    where=f"{self.name}:row group {number + 1}",
                    remedy=f"a prompt may have {LONGEST_PROMPT:,} characters",
                )

    def count(self) -> int:
        """Number of rows according to the file's metadata."""
        with self._open() as file:
            return int(file.metadata.num_rows)


@dataclass(frozen=True)
class TaggedFile:
    """A file whose prompts all have the same tag."""

    file: TextFile | JsonLines | JsonList | Table | ParquetTable
    tag: str

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.file.name

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for prompt in self.file.read(start):
            yield Prompt(prompt.text, with_tag(self.tag, self.name, prompt.metadata))

    def count(self) -> int:
        """Number of rows of the file."""
        return self.file.count()


PromptFile = TextFile | JsonLines | JsonList | Table | ParquetTable | TaggedFile

READERS: dict[str, Callable[[str, str, str | None], TextFile | JsonLines | JsonList | Table | ParquetTable]] = {
    ".txt": lambda name, column, tag: TextFile(name),
    ".jsonl": JsonLines,
    ".json": JsonList,
    ".csv": lambda name, column, tag: Table(name, column, ",", tag),
    ".tsv": lambda name, column, tag: Table(name, column, "\t", tag),
    ".parquet": ParquetTable,
}
"""Reader of each format by the end of a file's name. All but parquet, which has its own compression, can end in
``.gz``.
"""

FORMATS = ", ".join(READERS)


def format_of(name: str) -> str | None:
    """The key in :data:`READERS` for a file's name, or None for another kind of file."""
    lower = name.lower()
    plain = lower.removesuffix(".gz")
    found = next((suffix for suffix in READERS if plain.endswith(suffix)), None)
    return None if found == ".parquet" and lower != plain else found


NO_COLUMNS = f"use tag: {TAG_OF_FILE} for the file's name, or leave it out"


def open_file(name: str, column: str, tag: str | None = None) -> PromptFile:
    """The reader of a file whose format is known; checks that it is a regular file.

    Args:
        name: The file.
        column: Key or column that holds the prompt.
        tag: Key or column that holds the prompt's tag, or :data:`TAG_OF_FILE`.

    Raises:
        UserError: As :func:`check_regular`, or if a text file should have a column for the tag.
    """
    check_regular(name)
    suffix = str(format_of(name))
    if tag == TAG_OF_FILE:
        base = os.path.basename(name)
        return TaggedFile(READERS[suffix](name, column, None), base[: base.lower().rindex(suffix)])
    if tag is not None and suffix == ".txt":
        raise UserError(f"a text file has no column {tag!r}", where=name, remedy=NO_COLUMNS)
    return READERS[suffix](name, column, tag)
