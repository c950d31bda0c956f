"""An endless list of GenEval-style training prompts that has none of the 553 official test prompts.

A *content* is what a prompt asks for. In all tasks but one, no content of the test set is drawn, in either order of
its objects. The test prompts of ``single_object`` name all 80 classes, so these are drawn in other words.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from math import prod
from typing import Any

from gdmd_lightning.geneval.classes import CLASSES, COLORS, COUNTS, TASKS
from gdmd_lightning.geneval.rules import RELATIONS
from gdmd_lightning.locations import PACKAGE
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.streams import python_stream

TEST_PROMPTS = PACKAGE / "assets" / "geneval" / "evaluation_metadata.jsonl"
"""The official prompts with their metadata."""

PREFIXES = ("a picture of", "an image of", "a photograph of")
"""Instead of "a photo of", for single objects."""

# People have no color in GenEval, and "person" is the first class.
_THINGS = CLASSES[1:]
_CHOICES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "single_object": (CLASSES, PREFIXES),
    "two_object": (CLASSES, CLASSES),
    "counting": (CLASSES, tuple(COUNTS)),
    "colors": (_THINGS, COLORS),
    "position": (CLASSES, CLASSES, RELATIONS),
    "color_attr": (_THINGS, _THINGS, COLORS, COLORS),
}


def training_prompt(seed: int, row: int) -> Prompt:
    """Prompt number ``row``: each six rows have one prompt of each task, in random order.

    It depends on the arguments only. A task repeats a prompt only after all its others.
    """
    group, place = divmod(row, len(TASKS))
    order = list(TASKS)
    python_stream("geneval tasks", seed, group).shuffle(order)
    task = order[place]
    passes, position = divmod(group, len(_pool(task)))
    return _prompt(task, *_choice(task, _shuffled(task, seed, passes)[position]))


def all_training_prompts() -> Iterator[Prompt]:
    """Every training prompt once, task by task."""
    for task in TASKS:
        for index in _pool(task):
            yield _prompt(task, *_choice(task, index))


def number_of_contents(task: str) -> int:
    """Number of different prompts of a task."""
    return len(_pool(task))


def _choice(task: str, index: int) -> tuple[Any, ...]:
    """The values that an index stands for, as digits of a number whose last digit changes fastest."""
    values: list[Any] = []
    for options in reversed(_CHOICES[task]):
        index, digit = divmod(index, len(options))
        values.insert(0, options[digit])
    return tuple(values)


@cache
def _pool(task: str) -> list[int]:
    """Indices of all contents of a task that are none of the test set and name no class or color twice."""
    held_out = _held_out(task)
    return [
        index
        for index in range(prod(map(len, _CHOICES[task])))
        if index not in held_out and _distinct(task, _choice(task, index))
    ]


def _distinct(task: str, choice: tuple[Any, ...]) -> bool:
    match task:
        case "two_object" | "position":
            return bool(choice[0] != choice[1])
        case "color_attr":
            return bool(choice[0] != choice[1] and choice[2] != choice[3])
    return True


@cache
def _held_out(task: str) -> frozenset[int]:
    """Indices of the test set's contents, in both orders of their objects."""
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    found: set[tuple[Any, ...]] = set()
    for line in TEST_PROMPTS.read_text(encoding="utf-8").splitlines():
        metadata = json.loads(line)
        one, *others = metadata["include"]
        if metadata["tag"] != task or task == "single_object":
            continue
        match task:
            case "two_object":
                found |= {(one["class"], others[0]["class"]), (others[0]["class"], one["class"])}
            case "counting":
                found.add((one["class"], one["count"]))
            case "colors":
                found.add((one["class"], one["color"]))
            case "position":
                relation = others[0]["position"][0]
                found.add((others[0]["class"], one["class"], relation))
                found.add((one["class"], others[0]["class"], opposite[relation]))
            case "color_attr":
                found.add((one["class"], others[0]["class"], one["color"], others[0]["color"]))
                found.add((others[0]["class"], one["class"], others[0]["color"], one["color"]))
    return frozenset(_index(task, choice) for choice in found)


def _index(task: str, choice: tuple[Any, ...]) -> int:
    index = 0
    for options, value in zip(_CHOICES[task], choice, strict=True):
        index = index * len(options) + options.index(value)
    return index


@cache
def _shuffled(task: str, seed: int, number: int) -> list[int]:
    """The order of one pass over a task."""
    order = list(_pool(task))
    python_stream("geneval", seed, task, number).shuffle(order)
    return order


def _prompt(task: str, *choice: Any) -> Prompt:
    metadata: dict[str, Any] = {"tag": task}
    match task, choice:
        case "single_object", (name, prefix):
            metadata["include"] = [{"class": name, "count": 1}]
            text = f"{prefix} {_article(name)}"
        case "two_object", (one, other):
            metadata["include"] = [{"class": one, "count": 1}, {"class": other, "count": 1}]
            text = f"a photo of {_article(one)} and {_article(other)}"
        case "counting", (name, count):
            metadata["include"] = [{"class": name, "count": count}]
            metadata["exclude"] = [{"class": name, "count": count + 1}]
            text = f"a photo of {COUNTS[count]} {name}{'es' if name.endswith('s') else 's'}"
        case "colors", (name, color):
            metadata["include"] = [{"class": name, "count": 1, "color": color}]
            text = f"a photo of {_article(color)} {name}"
        case "position", (name, landmark, relation):
            placed = {"class": name, "count": 1, "position": [relation, 0]}
            metadata["include"] = [{"class": landmark, "count": 1}, placed]
            text = f"a photo of {_article(name)} {relation} {_article(landmark)}"
        case "color_attr", (one, other, color, second):
            colored = ((one, color), (other, second))
            metadata["include"] = [{"class": name, "count": 1, "color": paint} for name, paint in colored]
            text = f"a photo of {_article(color)} {one} and {_article(second)} {other}"
        case _:
            raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
    return Prompt(text, {**metadata, "prompt": text})


def _article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
