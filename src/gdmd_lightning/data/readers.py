"""Streaming prompt sources: files, Hugging Face data sets and the Shapes world, none of them held in memory.

A *row* is one prompt; rows are numbered from 0 in the order of the source. Lines of only ASCII white space in
``.txt`` and ``.jsonl`` files are not rows, and neither are empty lines in ``.csv`` files.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args

from gdmd_lightning.data.files import BATCH_ROWS, CsvTable, JsonLines, ParquetTable, TextFile
from gdmd_lightning.data.rows import as_prompt, no_column
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import Split, prompt_at

if TYPE_CHECKING:
    import datasets

FILES = (".txt", ".jsonl", ".csv", ".parquet")


class PromptSource(Protocol):
    """A sequence of prompts that can be read repeatedly from any row, always in the same order."""

    @property
    def name(self) -> str:
        """Name that the user gave, for messages."""
        ...

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts of one pass from row ``start``; none if the pass is shorter.

        Rows before ``start`` are skipped without parsing them.

        Raises:
            UserError: If a row is not a prompt, or the source cannot be read.
        """
        ...

    def count(self) -> int:
        """Number of rows in a pass, found without parsing them."""
        ...


def open_source(source: str, *, column: str = "prompt", split: str = "train", seed: int = 0) -> PromptSource:
    """Choose the reader for a source and read the first prompt, so that an invalid source fails early.

    Args:
        source: A ``.txt`` (one prompt per line), ``.jsonl``, ``.csv`` or ``.parquet`` file; a Hugging Face
            data set as ``organization/name`` or as a local folder; or ``shapes``, the prompts of the Shapes
            world.
        column: Key or column that holds the prompt; ignored for ``.txt`` files and the Shapes world.
        split: Split of a Hugging Face data set or of the Shapes world; ignored for files.
        seed: Seed of the Shapes world's prompts.

    Raises:
        UserError: If the source does not exist, has no prompt, or its first row is not a prompt.
    """
    chosen = _choose(source, column, split, seed)
    if next(chosen.read(), None) is None:
        raise no_prompt(chosen)
    return chosen


def no_prompt(source: PromptSource) -> UserError:
    """Error for a source without a single prompt."""
    return UserError("there is no prompt in it", where=source.name, remedy="give a source with at least one prompt")


def _choose(source: str, column: str, split: str, seed: int) -> PromptSource:
    if source == "shapes":
        splits = get_args(Split)
        if split not in splits:
            raise UserError(f"no split {split!r}", where=source, remedy=f"its splits are {' and '.join(splits)}")
        return ShapesPrompts(cast(Split, split), seed)
    path = Path(source)
    suffix = path.suffix.lower()
    if source and path.is_dir():
        return HubDataset(source, column, split)
    if suffix in FILES:
        if not path.exists():
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
    # A suffix of letters means a file, so that a typo in a file's name never reaches the network. In names of
    # data sets a dot is followed by a number ("org/prompts-v1.5").
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not suffix[1:].isalpha() and not path.exists():
        return HubDataset(source, column, split)
    raise UserError(
        "unknown kind of prompt source",
        where=source or "data.source",
        remedy=f"give a {', '.join(FILES)} file, a Hugging Face data set as organization/name, or 'shapes'",
    )


@dataclass(frozen=True)
class HubDataset:
    """One column of a Hugging Face data set, or of a local folder that ``datasets`` can load, streamed."""

    name: str
    column: str = "prompt"
    split: str = "train"

    @cached_property
    def _dataset(self) -> datasets.IterableDataset:
        import datasets

        with self._explained():
            rows = datasets.load_dataset(self.name, split=self.split, streaming=True)
            columns = rows.column_names
        if columns is None:
            return rows
        if self.column not in columns:
            raise no_column(self.column, columns, self.name)
        # Other columns may hold images, which would be downloaded and decoded needlessly.
        return rows.select_columns([self.column])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from datasets.exceptions import DatasetsError

        try:
            yield
        except (DatasetsError, OSError, ValueError, RuntimeError) as error:
            raise UserError(
                f"cannot be read as a Hugging Face data set: {error}",
                where=self.name,
                remedy=f"give a readable organization/name with a split {self.split!r}, or a file",
            ) from error

    def _batches(self, start: int) -> Iterator[dict[str, list[Any]]]:
        with self._explained():
            # `.iter(size)` returns all rows; in a loader's worker `iter(dataset)` would return only a share.
            yield from self._dataset.skip(start).iter(BATCH_ROWS)

    def read(self, start: int = 0) -> Iterator[Prompt]:
        number = start
        for batch in self._batches(start):
            if self.column not in batch:
                raise no_column(self.column, batch, self.name)
            for text in batch[self.column]:
                number += 1
                yield as_prompt(text, f"{self.name}:row {number}")

    def count(self) -> int:
        """Number of rows, counted by streaming all of them, since a data set's card may be out of date."""
        return sum(len(next(iter(batch.values()))) for batch in self._batches(0))


@dataclass(frozen=True)
class ShapesPrompts:
    """Prompts of the Shapes world, with tasks drawn by ``TASK_WEIGHTS``.

    A row depends only on the seed and its number, so any row can be reached directly and a pass never ends.
    """

    split: Split = "train"
    seed: int = 0
    name: str = "shapes"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for row in range(start, self.count()):
            yield prompt_at(self.split, self.seed, row)

    def count(self) -> int:
        """More rows than any run reads."""
        return sys.maxsize
