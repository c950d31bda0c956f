"""Prompt files: one small class per format, each streaming from any row (see ``readers.PromptSource``)."""

from __future__ import annotations

import csv
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
    decoded,
    no_column,
    numbered_rows,
    object_as_prompt,
    parsed,
)
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

BATCH_ROWS = 1024
"""Rows decoded at once: enough for little overhead, few enough for the first prompt to come quickly."""


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

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for number, line in islice(numbered_rows(self.name), start, None):
            where = f"{self.name}:{number}"
            row = parsed(line, where)
            if not isinstance(row, dict):
                raise UserError(f"a JSON {type(row).__name__}", where=where, remedy="each line must be an object")
            yield object_as_prompt(row, self.column, where)

    def count(self) -> int:
        """Number of lines that are not blank."""
        return sum(1 for _ in numbered_rows(self.name))


@dataclass(frozen=True)
class JsonList:
    """One JSON list whose items are strings, or objects as in :class:`JsonLines`."""

    name: str
    column: str = "prompt"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for number, item in islice(numbered_items(self.name), start, None):
            where = f"{self.name}:{number}"
            yield object_as_prompt(item, self.column, where) if isinstance(item, dict) else as_prompt(item, where)

    def count(self) -> int:
        """Number of items."""
        return sum(1 for _ in numbered_items(self.name))


@dataclass(frozen=True)
class Table:
    """One column of a comma- or tab-separated file whose first record holds the column names."""

    name: str
    column: str = "prompt"
    delimiter: str = ","

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record with the number of its last line; empty lines are skipped."""
        first, size = 1, 0  # of the record that is being read

        def lines() -> Iterator[str]:
            nonlocal size
            for number, line in numbered_lines(self.name):
                size += len(line)
                if size > LONGEST_LINE:
                    raise too_long(f"{self.name}:{first}", "record")
                yield decoded(line, f"{self.name}:{number}")

        # Without strict, an unclosed quote would turn the rest of the file into one prompt.
        records = csv.reader(lines(), strict=True, delimiter=self.delimiter)
        try:
            for record in records:
                if record:
                    yield records.line_num, record
                first, size = records.line_num + 1, 0
        except csv.Error as error:
            kind = "CSV" if self.delimiter == "," else "TSV"
            raise UserError(f"broken {kind}: {error}", where=f"{self.name}:{records.line_num}") from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        records = self._records()
        for line, header in islice(records, 1):
            if self.column not in header:
                raise no_column(self.column, header, f"{self.name}:{line}")
            index = header.index(self.column)
            for number, record in islice(records, start, None):
                where = f"{self.name}:{number}"
                if len(record) != len(header):
                    separator = "comma" if self.delimiter == "," else "tab"
                    raise UserError(
                        f"{len(record)} fields where the header has {len(header)}",
                        where=where,
                        remedy=f'put prompts that contain a {separator} in "double quotes"',
                    )
                yield as_prompt(record[index], where)

    def count(self) -> int:
        """Number of records below the header."""
        return max(sum(1 for _ in self._records()) - 1, 0)


@dataclass(frozen=True)
class ParquetTable:
    """One column of a parquet file; row groups before the start are skipped by the file's metadata."""

    name: str
    column: str = "prompt"

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
            columns = file.schema_arrow.names
            if self.column not in columns:
                raise no_column(self.column, columns, self.name)
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
            for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=[self.column], use_threads=False):
                unwanted = min(max(start - row, 0), batch.num_rows)
                for number, value in enumerate(batch.column(self.column)[unwanted:], row + unwanted + 1):
                    where = f"{self.name}:row {number}"
                    try:
                        text = value.as_py()
                    except UnicodeDecodeError as error:
                        raise UserError("not UTF-8", where=where) from error
                    yield as_prompt(text, where)
                row += batch.num_rows

    def _check_size(self, file: ParquetFile, number: int) -> None:
        """Refuse a row group whose prompts are longer than allowed on average, before decompressing it."""
        group = file.metadata.row_group(number)
        for i in range(group.num_columns):
            column = group.column(i)
            # At most 4 bytes per character; 1 MB for headers of pages.
            if column.path_in_schema == self.column and (
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


PromptFile = TextFile | JsonLines | JsonList | Table | ParquetTable

READERS: dict[str, Callable[[str, str], PromptFile]] = {
    ".txt": lambda name, column: TextFile(name),
    ".jsonl": JsonLines,
    ".json": JsonList,
    ".csv": Table,
    ".tsv": lambda name, column: Table(name, column, "\t"),
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


def open_file(name: str, column: str) -> PromptFile:
    """The reader of a file whose format is known; checks that it is a regular file.

    Raises:
        UserError: As :func:`check_regular`.
    """
    check_regular(name)
    return READERS[str(format_of(name))](name, column)
