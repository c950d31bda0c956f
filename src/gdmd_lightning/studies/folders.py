"""Scores of pictures in directories, whoever made them; an interrupted scoring continues where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from gdmd_lightning.data.rows import numbered_rows, parsed
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.metrics.intervals import Interval, Value, intervals
from gdmd_lightning.metrics.scores import TaskScore, task_of
from gdmd_lightning.pictures import LIST, read_picture
from gdmd_lightning.prompts import Prompt

LISTS = (LIST, "metadata.jsonl")
"""As ``sample`` writes it, and as image folders have it."""
FORM = '{"file": ..., "prompt": ..., "metadata": {...}} or {"file_name": ..., "text": ..., further keys}'


@dataclass(frozen=True)
class Shot:
    """A picture of a prompt.

    Args:
        file: The picture.
        prompt: Its prompt with metadata.
        owner: What the pictures of one prompt have in common: its row in the list of prompts where that is known, else
            its text.
    """

    file: Path
    prompt: Prompt
    owner: Hashable


@dataclass(frozen=True)
class FolderScores:
    """The scores of a directory.

    Args:
        name: Its name in tables.
        pictures, prompts: Numbers of them.
        scores: Mean and 95% interval by ``<score>/<task>``.
    """

    name: str
    pictures: int
    prompts: int
    scores: dict[str, Interval]


def read_folder(directory: Path) -> list[Shot]:
    """The pictures that a directory lists, in the order of the list.

    Raises:
        UserError: If there is no list or no picture in it, a line is malformed, or a picture is not there.
    """
    found = next((directory / name for name in LISTS if (directory / name).is_file()), None)
    if found is None:
        raise UserError(
            f"it has no {LISTS[0]}, as sample writes it, and no {LISTS[1]}",
            where=str(directory),
            remedy=f"list the pictures in {LISTS[1]}, a line each: {FORM}",
        )
    shots = []
    for number, line in numbered_rows(str(found)):
        where = f"{found}:{number}"
        shots.append(_shot(directory, parsed(line, where), where))
    if not shots:
        raise UserError("it lists no picture", where=str(found))
    return shots


def _shot(directory: Path, row: Any, where: str) -> Shot:
    ours = isinstance(row, dict) and "file" in row
    file, text = ("file", "prompt") if ours else ("file_name", "text")
    if not isinstance(row, dict) or not isinstance(row.get(file), str) or not isinstance(row.get(text), str):
        raise UserError("not a picture with its prompt", where=where, remedy=f"write {FORM}")
    metadata = row.get("metadata", {}) if ours else {k: v for k, v in row.items() if k not in (file, text)}
    place = directory / row[file]
    if not place.is_file():
        raise UserError(f"no such picture: {str(place)!r}", where=where)
    known = isinstance(row.get("row"), int) and ours
    prompt = Prompt(row[text], metadata if isinstance(metadata, dict) else {})
    return Shot(place, prompt, row["row"] if known else prompt.text)


def score_folder(
    name: str,
    shots: Sequence[Shot],
    scores: Sequence[TaskScore],
    record: Path,
    settings: Mapping[str, Any],
    device: str = "cpu",
    batch_size: int = 32,
) -> FolderScores:
    """Score pictures; every value is kept in ``record``, and what it has is not scored again.

    Args:
        name: Name of the directory in tables.
        shots: The pictures.
        scores: What to compute.
        record: JSON lines: the settings of each score, then for each picture its digest, prompt and metadata, and its
            value and the parts of the value by score. Further scores may be added to it.
        settings: Of each score, by its name, as they were before it judged anything: attributes may change meanwhile.
        device: Where the scores' networks are.
        batch_size: Pictures scored at once.

    Raises:
        UserError: If a picture cannot be read or judged, or the record has a score with other settings.
    """
    for score in scores:
        score.check([shot.prompt for shot in shots])
    digests = [hashlib.sha256(shot.file.read_bytes()).hexdigest() for shot in shots]
    there, known = _read_record(record, settings)
    prompts = [shot.prompt for shot in shots]
    keys = [_key(digest, prompt) for digest, prompt in zip(digests, prompts, strict=True)]

    def lacks(i: int, score: TaskScore) -> bool:
        """Whether a picture has no value of a score, or not all of its parts."""
        value = known.get(keys[i], {}).get(score.name)
        return value is None or len(value.parts) != len(score.part_names(prompts[i]))

    absent = [i for i in range(len(shots)) if any(lacks(i, score) for score in scores)]
    with tqdm(desc=f"scoring {name}", unit="picture", total=len(shots), initial=len(shots) - len(absent)) as bar:
        for rows, images in _batches([shots[i].file for i in absent], batch_size):
            for score in scores:
                mine = [row for row in rows if lacks(absent[row], score)]
                if not mine:
                    continue
                score.place(torch.device(device))
                pictures = images[[row - rows[0] for row in mine]].to(device)
                values = score.values_of(pictures, [prompts[absent[row]] for row in mine])
                for row, value in zip(mine, values, strict=True):
                    known.setdefault(keys[absent[row]], {})[score.name] = value
            _write_record(record, there, known)
            bar.update(len(rows))
    found: dict[str, Interval] = {}
    owners, tasks = [shot.owner for shot in shots], [task_of(prompt) for prompt in prompts]
    for score in scores:
        names = [score.part_names(prompt) for prompt in prompts]
        by_name = intervals([known[key][score.name] for key in keys], tasks, names, owners)
        found |= {f"{score.name}/{task}": interval for task, interval in by_name.items()}
    return FolderScores(name, len(shots), len(set(owners)), found)


def _batches(files: Sequence[Path], size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Numbers of files and their pictures ``[B, 3, H, W]`` in [0, 1], at most ``size`` of one size at once."""
    loaded = ((number, _load(file)) for number, file in enumerate(files))
    for _, run in groupby(loaded, key=lambda pair: pair[1].shape):
        rows: list[int] = []
        images: list[Tensor] = []
        for number, image in run:
            rows.append(number)
            images.append(image)
            if len(rows) == size:
                yield rows, torch.stack(images)
                rows, images = [], []
        if rows:
            yield rows, torch.stack(images)


def _load(file: Path) -> Tensor:
    return torch.from_numpy(np.array(read_picture(file))).permute(2, 0, 1) / 255


Key = tuple[str, str, str]
"""Digest of a picture, its prompt, and the digest of the prompt's metadata, empty if it has none."""


def _key(digest: str, prompt: Prompt) -> Key:
    metadata = json.dumps(prompt.metadata, sort_keys=True, default=str)
    return digest, prompt.text, hashlib.sha256(metadata.encode()).hexdigest() if prompt.metadata else ""


def _read_record(record: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Key, dict[str, Value]]]:
    """Settings of all scores, those of the record and the given ones, and what the record has."""
    here = json.loads(json.dumps(settings))
    if not record.is_file():
        return here, {}
    another = "remove it, or use another --out"
    try:
        first, *rows = [json.loads(line) for line in record.read_bytes().splitlines()]
        there = first["settings"]
        known = {
            (row["picture"], row["prompt"], row.get("metadata", "")): _values(row["scores"], row.get("parts", {}))
            for row in rows
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("not a record of scores", where=str(record), remedy=another) from error
    if not isinstance(there, dict):
        raise UserError("it was written by an earlier version", where=str(record), remedy=another)
    if other := [name for name in here if name in there and there[name] != here[name]]:
        raise UserError(f"its score {other[0]!r} had other settings", where=str(record), remedy=another)
    return {**there, **here}, known


def _values(scores: dict[str, Any], parts: dict[str, Any]) -> dict[str, Value]:
    return {name: Value(float(value), tuple(map(float, parts.get(name, ())))) for name, value in scores.items()}


def _write_record(record: Path, settings: dict[str, Any], known: dict[Key, dict[str, Value]]) -> None:
    rows: list[Any] = [{"settings": settings}]
    for (digest, text, metadata), values in known.items():
        row = {"picture": digest, "prompt": text, "scores": {name: each.value for name, each in values.items()}}
        parts = {name: each.parts for name, each in values.items() if each.parts}
        rows.append({**row, **({"metadata": metadata} if metadata else {}), **({"parts": parts} if parts else {})})
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(record, text.encode("utf-8", "backslashreplace"))
