"""Streaming prompt sources: files, Hugging Face data sets and the Shapes world, none of them held in memory.

A *row* is one prompt; the rows of a source are numbered from 0 in the order in which they stand. Lines of ASCII white
space alone are no rows in ``.txt`` and ``.jsonl``, nor are empty lines in ``.csv``.
"""

from __future__ import annotations

import random
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
from gdmd_lightning.shapes.captions import TASK_WEIGHTS, Split, prompts

if TYPE_CHECKING:
    import datasets

FILES = (".txt", ".jsonl", ".csv", ".parquet")


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
            as ``organisation/name``, or a local folder of one; or ``shapes``, the prompts of the Shapes world.
        column: The key or column that holds the prompt; a ``.txt`` file and the Shapes world have none.
        split: The split of a Hugging Face data set or of the Shapes world; a file has none.
        seed: Seed of the Shapes world's prompts.

    Raises:
        UserError: There is no such source, it has no prompt, or its first row is not one.
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
    # A suffix of letters is taken for a file's, so that a slip in a file's name never goes to the network; in a
    # data set's name a dot stands before a number ("org/prompts-v1.5").
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not suffix[1:].isalpha() and not path.exists():
        return HubDataset(source, column, split)
    raise UserError(
        "unknown kind of prompt source",
        where=source or "data.source",
        remedy=f"give a {', '.join(FILES)} file, a Hugging Face data set as organisation/name, or 'shapes'",
    )


@dataclass(frozen=True)
class HubDataset:
    """One column of a Hugging Face data set, streamed; also of a local folder that ``datasets`` can load."""

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
        # Other columns may hold images, which would be fetched and decoded for nothing.
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
                remedy=f"give organisation/name of one that you may read, with a split {self.split!r}, or a file",
            ) from error

    def _batches(self, start: int) -> Iterator[dict[str, list[Any]]]:
        with self._explained():
            # `iter(dataset)` would give each loader's worker only a share of the rows; `.iter(size)` does not.
            yield from self._dataset.skip(start).iter(BATCH_ROWS)

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        number = start
        for batch in self._batches(start):
            if self.column not in batch:
                raise no_column(self.column, batch, self.name)
            for text in batch[self.column]:
                number += 1
                yield as_prompt(text, f"{self.name}:row {number}")

    def count(self) -> int:
        """The number of rows, for which all are streamed once: what a data set's card says may be out of date."""
        return sum(len(next(iter(batch.values()))) for batch in self._batches(0))


@dataclass(frozen=True)
class ShapesPrompts:
    """The Shapes world's own prompts, tasks drawn by ``TASK_WEIGHTS``; a row depends on the seed and its number alone.

    So any row is reached at once, and a pass need never end.
    """

    split: Split = "train"
    seed: int = 0
    name: str = "shapes"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts from row ``start`` on."""
        tasks, weights = list(TASK_WEIGHTS), list(TASK_WEIGHTS.values())
        for row in range(start, self.count()):
            rng = random.Random(f"shapes {self.seed} {row}")
            (task,) = rng.choices(tasks, weights)
            yield rng.choice(prompts(task, self.split))

    def count(self) -> int:
        """More than anyone reads."""
        return sys.maxsize
