"""The pictures of an evaluation with their scores, written as they are judged: what is there is not made again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gdmd_lightning.files import append_lines, write_atomically
from gdmd_lightning.metrics.intervals import Value
from gdmd_lightning.pictures import LIST, encode_png, picture_name, to_bytes
from gdmd_lightning.prompts import Prompt


@dataclass(frozen=True)
class KeptPictures:
    """A directory of PNG files and their list: a JSON line of file, prompt, seed and every score for each picture.

    Every rank adds to a list of its own, and rank 0 makes one of them when all have finished. A picture that is not
    listed is made again.

    Args:
        directory: The directory.
        key: Names all that decides what the pictures and their scores are; those of another key are not taken.
        per_prompt: Pictures of each prompt.
        seed: Seed of the noise.
        rank: This rank.
    """

    directory: Path
    key: str
    per_prompt: int
    seed: int
    rank: int = 0

    def known(self, prompts: Sequence[Prompt]) -> dict[int, dict[str, Value]]:
        """Values by score of the pictures that are there, by their index in the test set.

        Args:
            prompts: The test set, each prompt as often as it has pictures.
        """
        numbers = {self._name(index): index for index in range(len(prompts))}
        found = {}
        for row in self._rows():
            index = numbers.get(row["file"])
            if index is not None and (self.directory / row["file"]).is_file():
                parts = row.get("parts", {})
                found[index] = {name: Value(value, tuple(parts.get(name, ()))) for name, value in row["scores"].items()}
        return found

    def keep(
        self,
        indices: Sequence[int],
        images: Tensor,
        prompts: Sequence[Prompt],
        values: Mapping[str, Sequence[Value]],
    ) -> None:
        """Write judged pictures ``[B, 3, H, W]`` in [0, 1], and then list them.

        Args:
            indices: Their indices in the test set.
            images: The pictures.
            prompts: Their prompts.
            values: Their values by score.

        Raises:
            WriteError: If the disk is full or the place cannot be written.
        """
        lines = []
        for place, (index, pixels, prompt) in enumerate(zip(indices, to_bytes(images), prompts, strict=True)):
            mine = {name: each[place] for name, each in values.items()}
            name = self._name(index)
            png = encode_png(pixels, {"prompt": prompt.text, "seed": str(self.seed)})
            write_atomically(self.directory / name, png, flush=False)
            lines.append(json.dumps(self._row(index, prompt, mine), ensure_ascii=False) + "\n")
        append_lines(self.directory / f"pictures-{self.rank}.jsonl", _encoded(lines))

    def finish(self) -> None:
        """Make one list of those of all ranks, in the order of the test set; one rank calls it, when all are done.

        Raises:
            WriteError: If the disk is full or the place cannot be written.
        """
        rows = {row["file"]: row for row in self._rows()}
        lines = [json.dumps(rows[name], ensure_ascii=False) + "\n" for name in sorted(rows)]
        write_atomically(self.directory / LIST, _encoded(lines))
        for left in [*self.directory.glob("pictures-*.jsonl"), *self.directory.glob("*.part")]:
            left.unlink()

    def remove_earlier(self) -> None:
        """Remove the pictures, not the lists, of the directories of earlier evaluations next to this one."""
        for other in self.directory.parent.iterdir():
            if other.name.isdecimal() and int(other.name) < int(self.directory.name):
                for picture in other.glob("*.png"):
                    picture.unlink()

    def _name(self, index: int) -> str:
        return picture_name(*divmod(index, self.per_prompt))

    def _row(self, index: int, prompt: Prompt, values: Mapping[str, Value]) -> dict[str, Any]:
        row, number = divmod(index, self.per_prompt)
        parts = {name: each.parts for name, each in values.items() if each.parts}
        return {
            "file": self._name(index),
            "prompt": prompt.text,
            "row": row,
            "number": number,
            "seed": self.seed,
            **({"metadata": prompt.metadata} if prompt.metadata else {}),
            "scores": {name: each.value for name, each in values.items()},
            **({"parts": parts} if parts else {}),
            "evaluation": self.key,
        }

    def _rows(self) -> list[dict[str, Any]]:
        """All listed pictures of this key; the last line of a killed process may be incomplete."""
        found = []
        for file in sorted(self.directory.glob("pictures*.jsonl")):
            for line in file.read_bytes().splitlines():  # of bytes: a prompt may have a line separator of Unicode
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                if isinstance(row, dict) and row.get("evaluation") == self.key:
                    found.append(row)
        return found


def _encoded(lines: Sequence[str]) -> bytes:
    return "".join(lines).encode("utf-8", "backslashreplace")
