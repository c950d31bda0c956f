"""Captions of the Shapes world: six tasks as in GenEval, split into training and test prompts.

Metadata has GenEval's form, see ``geneval/rules.py``.
"""

from __future__ import annotations

import random
from functools import cache
from itertools import permutations, product
from typing import Any, Literal

from gdmd_lightning.geneval.classes import TASKS as TASKS
from gdmd_lightning.geneval.rules import RELATIONS
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.streams import python_stream

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "green", "blue", "yellow")
COUNTS = {2: "two", 3: "three"}
PREFIXES = ("", "photo of ", "picture of ", "drawing of ", "painting of ")

# A small model learns relations and attribute binding most slowly, and these tasks have the most contents.
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
    """Caption of GenEval-style metadata, without a prefix."""
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
    """All distinct contents of a task, as GenEval-style metadata without ``prompt``."""
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
            # As in GenEval, the first clause is the landmark and the second is placed relative to it.
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

    In tasks with many contents (position, color_attr) a quarter of the *contents* is reserved for testing, so
    the test asks for combinations of shape, color and relation that training never shows. In the other tasks
    a quarter of the pairs of content and prefix is reserved.
    """
    rows = [(content, prefix) for content in contents(task) for prefix in PREFIXES]
    keys = [describe(content) if len(contents(task)) >= 24 else prefix + describe(content) for content, prefix in rows]
    distinct = sorted(set(keys))
    held_out = set(python_stream("held out", task).sample(distinct, len(distinct) // 4))
    chosen = [row for row, key in zip(rows, keys, strict=True) if (key in held_out) == (split == "test")]
    return tuple(
        Prompt(text, {**content, "prompt": text}) for content, prefix in chosen for text in [prefix + describe(content)]
    )


def prompt_at(split: Split, seed: int, row: int) -> Prompt:
    """Random prompt number ``row`` of an endless list, with its task drawn by ``TASK_WEIGHTS``.

    It depends on the arguments only, so any row can be read without those before it.
    """
    rng = python_stream("shapes", seed, row)
    (task,) = rng.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()))
    return rng.choice(prompts(task, split))


def evaluation_prompts(per_task: int) -> list[Prompt]:
    """Fixed test prompts, ``per_task`` of each task.

    If a task has fewer, its prompts repeat in turn, just as GenEval takes several pictures per prompt.
    """
    out = []
    for task in TASKS:
        pool = list(prompts(task, "test"))
        python_stream("order", task).shuffle(pool)
        out += [pool[i % len(pool)] for i in range(per_task)]
    return out


def corrupt(metadata: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Copy a content with one class, color, count or relation redrawn, like an error in a web caption.

    The redrawn value always differs from the true one. A redrawn class may be that of the other object.
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
    """The ``exclude`` clauses of a task: an exact count rules out one more object."""
    return [_clause(include[0]["class"], include[0]["count"] + 1)] if task == "counting" else []
