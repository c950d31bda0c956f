"""Streaming prompt sources: files, Hugging Face data sets and the Shapes world, none of them held in memory.

A *row* is one prompt; rows are numbered from 0 in the order of the source. Lines of only ASCII white space in
``.txt`` and ``.jsonl`` files are not rows, and neither are empty lines in ``.csv`` and ``.tsv`` files.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, cast, get_args

from gdmd_lightning.data.files import FORMATS, format_of, open_file
from gdmd_lightning.data.hub import open_dataset, open_folder
from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.training_prompts import TEST_PROMPTS, training_prompt
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import Split, prompt_at


class PromptSource(Protocol):
    """A sequence of prompts that can be read repeatedly from any row, always in the same order."""

    @property
    def name(self) -> str:
        """Name that the user gave, for messages."""
        ...

    def read(self, start: int = 0) -> Iterator[Prompt]:
        """The prompts of one pass from row ``start``; none if the pass is shorter.

        Rows before ``start`` are skipped without checking them.

        Raises:
            UserError: If a row is not a prompt, or the source cannot be read.
        """
        ...

    def count(self) -> int:
        """Number of rows in a pass, found without checking them."""
        ...


def open_source(
    source: str, *, column: str = "prompt", split: str = "train", seed: int = 0, tag: str | None = None
) -> PromptSource:
    """Choose the reader for a source and read the first prompt, so that an invalid source fails early.

    Args:
        source: A ``.txt`` (one prompt per line), ``.jsonl``, ``.json`` (a list), ``.csv``, ``.tsv`` or
            ``.parquet`` file, also compressed (``.txt.gz``); a Hugging Face data set as ``organization/name``;
            a local folder; ``shapes``, the prompts of the Shapes world; or ``geneval``, endless prompts in GenEval's
            form, of which ``test`` is the official set.
        column: Key or column that holds the prompt; ignored for ``.txt`` files, Shapes and GenEval.
        split: Split of a Hugging Face data set, a folder, Shapes or GenEval; ignored for files.
        seed: Seed of the training prompts of Shapes and GenEval.
        tag: Key or column whose value becomes the metadata's ``tag``, by which scores are reported, or ``file`` for the
            name of the prompt's file; Shapes and GenEval have their own.

    Raises:
        UserError: If the source does not exist, has no prompt, or its first row is not a prompt or has no tag.
    """
    chosen = _choose(source, column, split, seed, tag)
    if next(chosen.read(), None) is None:
        raise no_prompt(chosen)
    return chosen


def is_endless(source: PromptSource) -> bool:
    """Whether a source generates prompts without an end."""
    return isinstance(source, ShapesPrompts | GenEvalPrompts)


def no_prompt(source: PromptSource) -> UserError:
    """Error for a source without a single prompt."""
    return UserError("there is no prompt in it", where=source.name, remedy="give a source with at least one prompt")


def _choose(source: str, column: str, split: str, seed: int, tag: str | None) -> PromptSource:
    if source in ("shapes", "geneval") and tag is not None:
        raise UserError("its prompts have tags", where=source, remedy="leave tag out")
    if source == "shapes":
        splits = get_args(Split)
        if split not in splits:
            raise UserError(f"no split {split!r}", where=source, remedy=f"its splits are {' and '.join(splits)}")
        return ShapesPrompts(cast(Split, split), seed)
    if source == "geneval":
        if split not in ("train", "test"):
            raise UserError(f"no split {split!r}", where=source, remedy="its splits are train and test")
        return open_file(str(TEST_PROMPTS), column) if split == "test" else GenEvalPrompts(seed)
    if format_of(source):
        return open_file(source, column, tag)
    # os.path, unlike Path, raises no error for a path that is too long or may not be searched.
    if source and os.path.isdir(source):
        return open_folder(source, column, split, tag)
    # A suffix of letters means a file, so that a typo in a file's name never reaches the network. In names of
    # data sets a dot is followed by a number ("org/prompts-v1.5").
    suffix = os.path.splitext(source)[1]
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source) and not suffix[1:].isalpha() and not os.path.exists(source):
        return open_dataset(source, column, split, tag)
    raise UserError(
        "unknown kind of prompt source",
        where=source or "data.source",
        remedy=f"give a {FORMATS} file, a Hugging Face data set as organization/name, 'shapes' or 'geneval'",
    )


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


@dataclass(frozen=True)
class GenEvalPrompts:
    """Training prompts in GenEval's form, without what its 553 test prompts ask for; the six tasks equally often.

    A row depends only on the seed and its number, so any row can be reached directly and a pass never ends.
    """

    seed: int = 0
    name: str = "geneval"

    def read(self, start: int = 0) -> Iterator[Prompt]:
        for row in range(start, self.count()):
            yield training_prompt(self.seed, row)

    def count(self) -> int:
        """More rows than any run reads."""
        return sys.maxsize
