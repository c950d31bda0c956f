"""Streaming prompt sources: one small class a format, none of which holds a corpus in memory.

A *row* is one prompt; rows of a source are numbered from 0 in the order in which they stand. Lines that are empty
or hold only ASCII white space are no rows in ``.txt``, ``.jsonl`` and ``.csv``; every other line that is not a
prompt is an error that names it, never skipped. Errors count lines and rows from 1, as editors do.
"""

from __future__ import annotations

import codecs
import csv
import json
import random
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import TASK_WEIGHTS, Split, prompts

if TYPE_CHECKING:
    import datasets
    from pyarrow.parquet import ParquetFile

# Rows decoded at once: large enough that decoding costs little, small enough that a first prompt comes quickly.
BATCH_ROWS = 256


class PromptSource(Protocol):
    """Something that can be read from any row to its end, again and again, always in the same order."""

    @property
    def name(self) -> str:
        """What the user called it, for messages."""
        ...

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts of one pass from row ``start`` on, none where the pass is shorter.

        Rows before ``start`` are passed over without parsing them.

        Raises:
            UserError: A row is not a prompt, or the source cannot be read.
        """
        ...

    def count(self) -> int:
        """How many rows a pass has, found without parsing them."""
        ...


def open_source(source: str, *, column: str = "prompt", split: str = "train", seed: int = 0) -> PromptSource:
    """Choose the reader of a source and read its first prompt, so that a wrong source fails here.

    Args:
        source: A ``.txt`` (a prompt a line), ``.jsonl``, ``.csv`` or ``.parquet`` file; a data set of Hugging Face
            as ``organisation/name`` or a folder of one; or ``shapes``, the prompts of the Shapes world.
        column: The key or column that holds the prompt.
        split: The split of a Hugging Face data set or of the Shapes world.
        seed: Seed of the Shapes world's prompts.

    Raises:
        UserError: There is no such source, it has no prompt, or its first row is not a prompt.
    """
    chosen = _choose(source, column, split, seed)
    if next(chosen.read(), None) is None:
        raise no_prompt(chosen)
    return chosen


def no_prompt(source: PromptSource) -> UserError:
    """The error for a source without a single prompt."""
    return UserError("there is no prompt in it", where=source.name, remedy="give a source with at least one prompt")


def _choose(source: str, column: str, split: str, seed: int) -> PromptSource:
    if source == "shapes":
        if split not in get_args(Split):
            raise UserError(f"no split {split!r}", where=source, remedy=f"choose of {', '.join(get_args(Split))}")
        return ShapesPrompts(cast(Split, split), seed)
    path = Path(source)
    suffix = path.suffix.lower()
    if suffix in (".txt", ".jsonl", ".csv", ".parquet"):
        if not path.is_file():
            raise UserError("no such file", where=source, remedy="give the path of an existing prompt file")
        match suffix:
            case ".txt":
                return TextFile(source)
            case ".jsonl":
                return JsonLines(source, column)
            case ".csv":
                return CsvTable(source, column)
            case _:
                return ParquetTable(source, column)
    # A suffix of letters is a file's; in a data set's name a dot stands before a number ("org/prompts-v1.5").
    organisation_and_name = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) and not suffix[1:].isalpha()
    if path.is_dir() or (organisation_and_name and not path.exists()):
        return HubDataset(source, column, split)
    raise UserError(
        "unknown kind of prompt source",
        where=source,
        remedy="give a .txt, .jsonl, .csv or .parquet file, a Hugging Face data set as organisation/name, or 'shapes'",
    )


@dataclass(frozen=True)
class TextFile:
    """A prompt a line, without the white space around it."""

    name: str

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        for number, line in islice(_lines(self.name), start, None):
            where = f"{self.name}:{number}"
            yield _prompt(_decode(line, where), where)

    def count(self) -> int:
        """The number of lines that are not blank."""
        return sum(1 for _ in _lines(self.name))


@dataclass(frozen=True)
class JsonLines:
    """A JSON object a line; the whole object becomes the prompt's metadata, as GenEval's lines want it."""

    name: str
    column: str = "prompt"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        for number, line in islice(_lines(self.name), start, None):
            where = f"{self.name}:{number}"
            try:
                row = json.loads(_decode(line, where))
            except json.JSONDecodeError as error:
                raise UserError(f"broken JSON at column {error.colno}: {error.msg}", where=where) from error
            if not isinstance(row, dict):
                raise UserError(f"a JSON {type(row).__name__}", where=where, remedy="each line must be an object")
            if self.column not in row:
                raise _no_column(self.column, row, where)
            prompt = _prompt(row[self.column], where, row)
            # JSON alone can spell half a surrogate pair, which no tokenizer takes.
            if any("\ud800" <= letter <= "\udfff" for letter in prompt.text):
                raise UserError(f"{self.column!r} holds half a surrogate pair", where=where)
            yield prompt

    def count(self) -> int:
        """The number of lines that are not blank."""
        return sum(1 for _ in _lines(self.name))


@dataclass(frozen=True)
class CsvTable:
    """One column of a comma-separated file whose first record names the columns."""

    name: str
    column: str = "prompt"

    def _records(self) -> Iterator[tuple[int, list[str]]]:
        """The line on which each record ends, and its fields."""
        lines = (_decode(line, f"{self.name}:{number}") for number, line in _raw_lines(self.name))
        # Strict, or an unclosed quote would swallow the rest of the file into one prompt.
        records = csv.reader(lines, strict=True)
        try:
            for record in records:
                if record:
                    yield records.line_num, record
        except csv.Error as error:
            raise UserError(f"broken CSV: {error}", where=f"{self.name}:{records.line_num}") from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        records = self._records()
        for line, header in islice(records, 1):
            if self.column not in header:
                raise _no_column(self.column, header, f"{self.name}:{line}")
            index = header.index(self.column)
            for number, record in islice(records, start, None):
                where = f"{self.name}:{number}"
                if len(record) != len(header):
                    raise UserError(
                        f"{len(record)} fields where the header has {len(header)}",
                        where=where,
                        remedy='write a prompt that holds a comma in "quotes"',
                    )
                yield _prompt(record[index], where)

    def count(self) -> int:
        """The number of records below the header."""
        return max(sum(1 for _ in self._records()) - 1, 0)


@dataclass(frozen=True)
class ParquetTable:
    """One column of a parquet file; whole row groups are passed over through the file's metadata."""

    name: str
    column: str = "prompt"

    @contextmanager
    def _open(self) -> Iterator[ParquetFile]:
        import pyarrow
        from pyarrow.parquet import ParquetFile

        try:
            # A buffer, so that a column is streamed rather than read a row group at a time.
            with ParquetFile(self.name, buffer_size=1 << 20) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise UserError(f"not a readable parquet file: {error}", where=self.name) from error

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        with self._open() as file:
            columns = file.schema_arrow.names
            if self.column not in columns:
                raise _no_column(self.column, columns, self.name)
            first, group, groups = 0, 0, file.num_row_groups
            while group < groups and first + file.metadata.row_group(group).num_rows <= start:
                first += file.metadata.row_group(group).num_rows
                group += 1
            # One thread: loader workers are forked, and threads do not survive a fork.
            wanted = dict(row_groups=list(range(group, groups)), columns=[self.column], use_threads=False)
            for batch in file.iter_batches(BATCH_ROWS, **wanted):
                rows = batch.column(self.column)[max(start - first, 0) :]
                for number, row in enumerate(rows, first + max(start - first, 0) + 1):
                    yield _prompt(_text(row, self.name, number), f"{self.name}:row {number}")
                first += batch.num_rows

    def count(self) -> int:
        """The number of rows in the file's metadata."""
        with self._open() as file:
            return int(file.metadata.num_rows)


@dataclass(frozen=True)
class HubDataset:
    """One column of a Hugging Face data set, streamed; also of a local folder that ``datasets`` can load."""

    name: str
    column: str = "prompt"
    split: str = "train"

    @cached_property
    def _dataset(self) -> datasets.IterableDataset:
        import datasets

        with self._told():
            return datasets.load_dataset(self.name, split=self.split, streaming=True)

    @contextmanager
    def _told(self) -> Iterator[None]:
        from datasets.exceptions import DatasetsError

        try:
            yield
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot be read as a Hugging Face data set: {error}",
                where=self.name,
                remedy=f"give organisation/name of one that you may read, with a split {self.split!r}, or a file",
            ) from error

    def _rows(self, start: int) -> Iterator[dict[str, Any]]:
        with self._told():
            # `iter(dataset)` would give each loader worker only a share of the rows; `iter(batch_size)` does not.
            for batch in self._dataset.skip(start).iter(BATCH_ROWS):
                columns = list(batch)
                for values in zip(*batch.values(), strict=True):
                    yield dict(zip(columns, values, strict=True))

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        for number, row in enumerate(self._rows(start), start + 1):
            if self.column not in row:
                raise _no_column(self.column, row, self.name)
            yield _prompt(row[self.column], f"{self.name}:row {number}")

    def count(self) -> int:
        """The number of rows, for which they are all streamed once: a data set's card may be out of date."""
        return sum(1 for _ in self._rows(0))


@dataclass(frozen=True)
class ShapesPrompts:
    """The Shapes world's own prompts, tasks drawn by ``TASK_WEIGHTS``; row ``i`` depends on seed and ``i`` alone.

    A pass never ends in practice, and any row of it is reached at once.
    """

    split: Split = "train"
    seed: int = 0
    name: str = "shapes"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        tasks, weights = list(TASK_WEIGHTS), list(TASK_WEIGHTS.values())
        for row in range(start, sys.maxsize):
            rng = random.Random(f"shapes {self.seed} {row}")
            (task,) = rng.choices(tasks, weights)
            yield rng.choice(prompts(task, self.split))

    def count(self) -> int:
        """More than anyone reads."""
        return sys.maxsize
