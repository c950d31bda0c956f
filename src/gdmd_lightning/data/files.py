"""Prompt files: one small class per format, each streaming from any row (see ``readers.PromptSource``)."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from gdmd_lightning.data.rows import as_prompt, decoded, no_column, numbered_lines, numbered_rows
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
    """One JSON object per line; the whole object becomes the prompt's metadata, as GenEval's files need."""

    name: str
    column: str = "prompt"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for number, line in islice(numbered_rows(self.name), start, None):
            where = f"{self.name}:{number}"
            try:
                row = json.loads(decoded(line, where))
            except json.JSONDecodeError as error:
                raise UserError(f"broken JSON at column {error.colno}: {error.msg}", where=where) from error
            if not isinstance(row, dict):
                raise UserError(f"a JSON {type(row).__name__}", where=where, remedy="each line must be an object")
            if self.column not in row:
                raise no_column(self.column, row, where)
            yield as_prompt(row[self.column], where, row)

    def count(self) -> int:
        """Number of lines that are not blank."""
        return sum(1 for _ in numbered_rows(self.name))


@dataclass(frozen=True)
class CsvTable:
    """One column of a comma-separated file whose first record holds the column names."""

    name: str
    column: str = "prompt"

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """Each record with the number of its last line; empty lines are skipped."""
        lines = (decoded(line, f"{self.name}:{number}") for number, line in numbered_lines(self.name))
        # Without strict, an unclosed quote would turn the rest of the file into one prompt.
        records = csv.reader(lines, strict=True)
        try:
            for record in records:
                if record:
                    yield records.line_num, record
        except csv.Error as error:
            raise UserError(f"broken CSV: {error}", where=f"{self.name}:{records.line_num}") from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        records = self._records()
        for line, header in islice(records, 1):
            if self.column not in header:
                raise no_column(self.column, header, f"{self.name}:{line}")
            index = header.index(self.column)
            for number, record in islice(records, start, None):
                where = f"{self.name}:{number}"
                if len(record) != len(header):
                    raise UserError(
                        f"{len(record)} fields where the header has {len(header)}",
                        where=where,
                        remedy='put prompts that contain a comma in "double quotes"',
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
    def _open(self) -> Iterator[ParquetFile]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            # With a buffer a column is streamed; without one, a row group's whole column is kept in memory.
            with ParquetFile(self.name, buffer_size=1 << 20) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"not a readable parquet file: {error}", where=self.name) from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        with self._open() as file:
            columns = file.schema_arrow.names
            if self.column not in columns:
                raise no_column(self.column, columns, self.name)
            row, group = 0, 0
            while group < file.num_row_groups and row + file.metadata.row_group(group).num_rows <= start:
                row += file.metadata.row_group(group).num_rows
                group += 1
            groups = list(range(group, file.num_row_groups))
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

    def count(self) -> int:
        """Number of rows according to the file's metadata."""
        with self._open() as file:
            return int(file.metadata.num_rows)
