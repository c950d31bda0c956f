"""Prompts that the ``datasets`` library finds: on the Hugging Face hub, or in a local folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gdmd_lightning.data.files import BATCH_ROWS, TAG_OF_FILE, PromptFile, format_of, open_file
from gdmd_lightning.data.rows import as_prompt, check_columns, with_tag
from gdmd_lightning.errors import UserError, listed
from gdmd_lightning.prompts import Prompt

if TYPE_CHECKING:
    import datasets


@dataclass(frozen=True)
class FolderFiles:
    """The files of one split of a local folder, one after another, each read as if it were given alone."""

    name: str
    files: tuple[PromptFile, ...]

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for file in self.files:
            rows = file.count() if start else 0
            yield from file.read(start)
            start = max(start - rows, 0)

    def count(self) -> int:
        """Number of rows of all files."""
        return sum(file.count() for file in self.files)


@dataclass(frozen=True)
class HubDataset:
    """Columns of a Hugging Face data set, or of a local folder that ``datasets`` can load, streamed."""

    name: str
    column: str = "prompt"
    split: str = "train"
    tag: str | None = None

    @property
    def _columns(self) -> list[str]:
        return [self.column] if self.tag is None else [self.column, self.tag]

    @cached_property
    def _dataset(self) -> datasets.IterableDataset:
        library = _library(self.name)
        with _explained(self.name, self.split):
            rows = library.load_dataset(self.name, split=self.split, streaming=True)
            columns = rows.column_names
        if columns is None:
            return rows
        check_columns(columns, self.column, self.tag, self.name)
        # Other columns may hold images, which would be downloaded and decoded needlessly.
        return rows.select_columns(self._columns)

    def _batches(self, start: int) -> Iterator[dict[str, list[Any]]]:
        rows = self._dataset
        with _explained(self.name, self.split):
            # `.iter(size)` returns all rows; in a loader's worker `iter(dataset)` would return only a share.
            yield from rows.skip(start).iter(BATCH_ROWS)

    def read(self, start: int = 0) -> Iterator[Prompt]:
        number = start
        # Categories are numbers whose names are kept apart.
        names = getattr((self._dataset.features or {}).get(self.tag), "names", None)
        for batch in self._batches(start):
            check_columns(batch, self.column, self.tag, self.name)
            for text, *tags in zip(*(batch[name] for name in self._columns), strict=True):
                number += 1
                where = f"{self.name}:row {number}"
                if tags and names and isinstance(tags[0], int):
                    tags = [names[tags[0]]]
                yield as_prompt(text, where, with_tag(tags[0], where) if tags else None)

    def count(self) -> int:
        """Number of rows, counted by streaming all of them, since a data set's card may be out of date."""
        return sum(len(next(iter(batch.values()))) for batch in self._batches(0))


def open_folder(folder: str, column: str, split: str, tag: str | None = None) -> FolderFiles | HubDataset:
    """The files that ``datasets`` assigns to a split; the folder as ``datasets`` reads it if they are of other kinds.

    With our own readers the same file has the same rows, alone and in a folder: ``datasets`` takes a blank line of a
    text file for a row, and a byte order mark for text.

    Raises:
        UserError: If the folder has no data, or not this split.
    """
    library = _library(folder)
    with _explained(folder, split):
        found = library.load_dataset_builder(folder).config.data_files or {}
    splits = {str(name): [str(file) for file in files] for name, files in found.items()}
    if not all(format_of(file) for files in splits.values() for file in files):
        return open_dataset(folder, column, split, tag)
    if split not in splits:
        raise UserError(f"no split {split!r}", where=folder, remedy=f"its splits are {listed(splits)}")
    return FolderFiles(folder, tuple(open_file(file, column, tag) for file in splits[split]))


def open_dataset(name: str, column: str, split: str, tag: str | None = None) -> HubDataset:
    """A data set that ``datasets`` reads.

    Raises:
        UserError: If the tag should be the name of a file.
    """
    if tag == TAG_OF_FILE:
        raise UserError(f"tag: {TAG_OF_FILE} needs prompt files", where=name, remedy="set tag to a column")
    return HubDataset(name, column, split, tag)


def _library(source: str) -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        what = "data sets and folders need the library 'datasets', which is not installed"
        raise UserError(what, where=source, remedy="run: pip install datasets") from error
    return datasets


@contextmanager
def _explained(source: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # datasets, huggingface_hub, httpx and pyarrow raise dozens of unrelated types here
        reason = str(error)
        if "gated" in reason:
            remedy = f"accept its license at https://huggingface.co/datasets/{source}, then run: hf auth login"
        elif isinstance(error, FileNotFoundError):
            remedy = "check its name; if it is private, run: hf auth login"
        elif isinstance(error, ConnectionError):
            remedy = "check the connection, or give a file"
        else:
            remedy = f"give a readable organization/name with a split {split!r}, or a file"
        what = f"cannot be read as a Hugging Face data set: {reason or type(error).__name__}"
        raise UserError(what, where=source, remedy=remedy) from error
