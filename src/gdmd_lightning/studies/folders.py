"""Scores of pictures in directories, whoever made them; an interrupted scoring continues where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
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
from gdmd_lightning.metrics.scores import NO_TASK, Interval, TaskScore, bootstrap_mean, bootstrap_share, task_of
from gdmd_lightning.prompts import Prompt

LISTS = ("pictures.jsonl", "metadata.jsonl")
"""As ``sample`` writes it, and as image folders have it."""
FORM = '{"file": ..., "prompt": ..., "metadata": {...}} or {"file_name": ..., "text": ..., further keys}'


@dataclass(frozen=True)
class Shot:
    """A picture of a prompt.

    Args:
        file: The picture.
        prompt: Its prompt with metadata.
    """

    file: Path
    prompt: Prompt


@dataclass(frozen=True)
class Value:
    """A picture's value of a score.

    Args:
        value: The value.
        parts: Its parts, see :class:`TaskScore`.
    """

    value: float
    parts: tuple[float, ...] = ()


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
    return Shot(place, Prompt(row[text], metadata if isinstance(metadata, dict) else {}))


def score_folder(
    name: str,
    shots: Sequence[Shot],
    scores: Sequence[TaskScore],
    record: Path,
    settings: str,
    device: str = "cpu",
    batch_size: int = 32,
) -> FolderScores:
    """Score pictures; every value is kept in ``record``, and what it has is not scored again.

    Args:
        name: Name of the directory in tables.
        shots: The pictures.
        scores: What to compute.
        record: JSON lines: the scores' settings, then for each picture its digest and prompt, and its value and the
            parts of the value by score.
        settings: Names what the scores are; a record of others is not continued.
        device: Where the scores' networks are.
        batch_size: Pictures scored at once.

    Raises:
        UserError: If a picture cannot be read or judged, or the record is of other scores.
    """
    for score in scores:
        score.check([shot.prompt for shot in shots])
    digests = [hashlib.sha256(shot.file.read_bytes()).hexdigest() for shot in shots]
    known = _read_record(record, settings)
    keys = [(digest, shot.prompt.text) for digest, shot in zip(digests, shots, strict=True)]
    prompts = [shot.prompt for shot in shots]
    absent = [i for i, key in enumerate(keys) if not _is_complete(known.get(key, {}), scores, prompts[i])]
    with tqdm(desc=f"scoring {name}", unit="picture", total=len(shots), initial=len(shots) - len(absent)) as bar:
        for rows, images in _batches([shots[i].file for i in absent], batch_size):
            mine = [absent[row] for row in rows]
            values = judged(scores, images, [prompts[i] for i in mine], torch.device(device))
            for number, i in enumerate(mine):
                known[keys[i]] = {**known.get(keys[i], {}), **{score: values[score][number] for score in values}}
            _write_record(record, settings, known)
            bar.update(len(mine))
    found: dict[str, Interval] = {}
    for score in scores:
        mine_of = [known[key][score.name] for key in keys]
        names = [score.part_names(prompt) for prompt in prompts]
        by_name = {
            **intervals([each.value for each in mine_of], prompts),
            **part_intervals([each.parts for each in mine_of], names, prompts),
        }
        found |= {f"{score.name}/{task}": interval for task, interval in by_name.items()}
    return FolderScores(name, len(shots), len({prompt.text for prompt in prompts}), found)


def _is_complete(known: Mapping[str, Value], scores: Sequence[TaskScore], prompt: Prompt) -> bool:
    """Whether a picture has a value of every score, with its parts."""
    return all(
        score.name in known and len(known[score.name].parts) == len(score.part_names(prompt)) for score in scores
    )


@torch.no_grad()
def judged(
    scores: Sequence[TaskScore], images: Tensor, prompts: Sequence[Prompt], device: torch.device
) -> dict[str, list[Value]]:
    """One value per picture by score."""
    found = {}
    for score in scores:
        score.place(device)
        values, parts = score.judge_parts(images.to(device), prompts)
        each = zip(values.float().tolist(), parts, strict=True)
        found[score.name] = [Value(value, tuple(mine.float().tolist())) for value, mine in each]
    return found


def intervals(values: Sequence[float], prompts: Sequence[Prompt]) -> dict[str, Interval]:
    """Mean by task and over the tasks, with 95% bootstrap intervals over prompts.

    The pictures of a prompt are averaged first: they are no independent samples of the test set.

    Args:
        values: One for each picture.
        prompts: The prompt of each picture.
    """
    by_task: dict[str, dict[str, list[float]]] = {}
    for value, prompt in zip(values, prompts, strict=True):
        by_task.setdefault(task_of(prompt), {}).setdefault(prompt.text, []).append(value)
    parts = {task: np.array([np.mean(each) for each in by_text.values()]) for task, by_text in by_task.items()}
    overall = {"overall": bootstrap_mean(list(parts.values()))}
    return overall if list(parts) == [NO_TASK] else {**overall, **{t: bootstrap_mean([p]) for t, p in parts.items()}}


def part_intervals(
    parts: Sequence[Sequence[float]], names: Sequence[Sequence[str]], prompts: Sequence[Prompt]
) -> dict[str, Interval]:
    """Mean over the parts of each name, with 95% bootstrap intervals over prompts.

    Args:
        parts: Of each picture.
        names: Of its parts.
        prompts: The prompt of each picture.
    """
    by_name: dict[str, dict[str, list[list[float]]]] = {}
    for mine, named, prompt in zip(parts, names, prompts, strict=True):
        for name in dict.fromkeys(named):
            chosen = [value for value, other in zip(mine, named, strict=True) if other == name]
            by_name.setdefault(name, {}).setdefault(prompt.text, []).append(chosen)
    found = {}
    for name, by_text in by_name.items():
        sums = np.array([np.mean([np.sum(each) for each in pictures]) for pictures in by_text.values()])
        sizes = np.array([np.mean([len(each) for each in pictures]) for pictures in by_text.values()])
        found[name] = bootstrap_share(sums, sizes)
    return found


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
    from PIL import Image

    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"not a readable image: {error}", where=str(file)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


Key = tuple[str, str]
"""Digest of a picture, and its prompt."""


def _read_record(record: Path, settings: str) -> dict[Key, dict[str, Value]]:
    if not record.is_file():
        return {}
    another = "remove it, or use another --out"
    try:
        first, *rows = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
        there = first["settings"]
        known = {(row["picture"], row["prompt"]): _values(row["scores"], row.get("parts", {})) for row in rows}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError("not a record of scores", where=str(record), remedy=another) from error
    if there != settings:
        raise UserError("it was made with other scores", where=str(record), remedy=another)
    return known


def _values(scores: dict[str, Any], parts: dict[str, Any]) -> dict[str, Value]:
    return {name: Value(float(value), tuple(map(float, parts.get(name, ())))) for name, value in scores.items()}


def _write_record(record: Path, settings: str, known: dict[Key, dict[str, Value]]) -> None:
    rows: list[Any] = [{"settings": settings}]
    for (digest, text), values in known.items():
        row = {"picture": digest, "prompt": text, "scores": {name: each.value for name, each in values.items()}}
        parts = {name: each.parts for name, each in values.items() if each.parts}
        rows.append({**row, "parts": parts} if parts else row)
    write_atomically(record, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
