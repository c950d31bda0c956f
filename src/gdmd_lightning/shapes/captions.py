"""The captions of the Shapes world: six tasks as in GenEval, and which of their prompts are held out.

Metadata follows GenEval's lines (djghosh13/geneval): ``tag``, ``include`` clauses with ``class``, ``count``,
optional ``color`` and ``position`` ``[relation, index of an earlier clause]``, and ``exclude`` clauses.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import Any, Literal

from gdmd_lightning.prompts import Prompt

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")
RELATIONS = ("left of", "right of", "above", "below")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COUNTS = {2: "two", 3: "three"}
PREFIXES = ("", "photo of ", "picture of ", "drawing of ", "painting of ")

# Relations and bindings are what a small model learns slowest, and have the most contents.
TASK_WEIGHTS = {"single_object": 2, "two_object": 2, "counting": 2, "colors": 2, "position": 3, "color_attr": 3}

WORDS = tuple(
    sorted(
        {word for text in (*RELATIONS, *PREFIXES) for word in text.split()}
        | {"a", "and", *SHAPES, *(shape + "s" for shape in SHAPES), *COLORS, *COUNTS.values()}
    )
)

Split = Literal["train", "test"]


def _clause(shape: str, count: int = 1, color: str | None = None, position: list[Any] | None = None) -> dict[str, Any]:
    clause: dict[str, Any] = {"class": shape, "count": count}
    if color is not None:
        clause["color"] = color
    if position is not None:
        clause["position"] = position
    return clause


def describe(metadata: dict[str, Any]) -> str:
    """The caption of GenEval-style metadata, without a prefix."""
    phrases: list[str] = []
    for clause in metadata["include"]:
        color = clause["color"] + " " if "color" in clause else ""
        if clause["count"] == 1:
            phrase = f"a {color}{clause['class']}"
        else:
            phrase = f"{COUNTS[clause['count']]} {color}{clause['class']}s"
        phrases.append(phrase)
    for clause in metadata["include"]:
        if "position" in clause:
            return f"{phrases[1]} {clause['position'][0]} {phrases[0]}"
    return " and ".join(phrases)


def contents(task: str) -> list[dict[str, Any]]:
    """Every distinct content of a task, as GenEval-style metadata without its ``prompt``."""
    match task:
        case "single_object":
            rows = [[_clause(shape)] for shape in SHAPES]
        case "two_object":
            rows = [[_clause(one), _clause(two)] for one, two in permutations(SHAPES, 2)]
        case "counting":
            rows = [[_clause(shape, count)] for shape, count in product(SHAPES, COUNTS)]
        case "colors":
            rows = [[_clause(shape, color=color)] for shape, color in product(SHAPES, COLORS)]
        case "position":
            # As in GenEval, the first clause is the landmark and the second stands in relation to it.
            rows = [
                [_clause(landmark), _clause(shape, position=[relation, 0])]
                for (shape, landmark), relation in product(permutations(SHAPES, 2), RELATIONS)
            ]
        case "color_attr":
            rows = [
                [_clause(one, color=red), _clause(two, color=blue)]
                for (one, two), (red, blue) in product(permutations(SHAPES, 2), permutations(COLORS, 2))
            ]
        case _:
            raise ValueError(f"unknown task {task!r}; tasks are {', '.join(TASKS)}")
    out = []
    for include in rows:
        out.append({"tag": task, "include": include, "exclude": _one_more(task, include)})
    return out


@cache
def prompts(task: str, split: Split) -> tuple[Prompt, ...]:
    """All prompts of a task in one split; the two splits share no text.

    Where a task has many contents (position, color_attr) a quarter of the *contents* is held out, so the test
    asks for combinations of shape, colour and relation never seen together; elsewhere a quarter of the pairs
    of content and prefix.
    """
    rows = [(content, prefix) for content in contents(task) for prefix in PREFIXES]
    keys = [describe(content) if len(contents(task)) >= 24 else prefix + describe(content) for content, prefix in rows]
    distinct = sorted(set(keys))
    held_out = set(random.Random(f"held out {task}").sample(distinct, len(distinct) // 4))
    chosen = [row for row, key in zip(rows, keys, strict=True) if (key in held_out) == (split == "test")]
    return tuple(
        Prompt(text, {**content, "prompt": text}) for content, prefix in chosen for text in [prefix + describe(content)]
    )


def prompt_stream(split: Split, seed: int) -> Iterator[Prompt]:
    """An endless random stream of prompts, tasks drawn by ``TASK_WEIGHTS``."""
    rng = random.Random(seed)
    tasks, weights = list(TASK_WEIGHTS), list(TASK_WEIGHTS.values())
    while True:
        (task,) = rng.choices(tasks, weights)
        yield rng.choice(prompts(task, split))


def evaluation_prompts(per_task: int) -> list[Prompt]:
    """The fixed test prompts: ``per_task`` of each task, repeated in turn as GenEval draws several a prompt."""
    out = []
    for task in TASKS:
        pool = list(prompts(task, "test"))
        random.Random(f"order {task}").shuffle(pool)
        out += [pool[i % len(pool)] for i in range(per_task)]
    return out


def corrupt(metadata: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same content with one attribute, count, class or relation redrawn, as web captions err.

    The redrawn value always differs from the true one; a redrawn class may be that of the other object.
    """
    include = [dict(clause) for clause in metadata["include"]]
    choices = [(i, "class") for i in range(len(include))]
    choices += [(i, "color") for i, clause in enumerate(include) if "color" in clause]
    choices += [(i, "position") for i, clause in enumerate(include) if "position" in clause] * 2
    choices += [(i, "count") for i in range(len(include)) if metadata["tag"] == "counting"]
    i, what = rng.choice(choices)
    clause = include[i]
    match what:
        case "class":
            clause["class"] = rng.choice([s for s in SHAPES if s != clause["class"]])
        case "color":
            clause["color"] = rng.choice([c for c in COLORS if c != clause["color"]])
        case "position":
            clause["position"] = [rng.choice([r for r in RELATIONS if r != clause["position"][0]]), 0]
        case "count":
            clause["count"] = rng.choice([n for n in COUNTS if n != clause["count"]])
    return {**metadata, "include": include, "exclude": _one_more(metadata["tag"], include)}


def _one_more(task: str, include: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A counted class must not be there once more."""
    return [_clause(include[0]["class"], include[0]["count"] + 1)] if task == "counting" else []
