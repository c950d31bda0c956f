"""The check of prompts' metadata before anything is judged by it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.classes import TASKS
from gdmd_lightning.geneval.rules import RELATIONS
from gdmd_lightning.prompts import Prompt

KEYS = {"include": ("class", "count", "color", "position"), "exclude": ("class", "count")}
"""The keys of a clause that the rules read."""
REMEDY = "use data.source: shapes or geneval, or a .jsonl file with 'include' in each line"


def check_metadata(
    prompts: Sequence[Prompt],
    where: str,
    *,
    classes: Collection[str] | None = None,
    colors: Collection[str] | None = None,
) -> None:
    """Check that prompts carry metadata in GenEval's form.

    Args:
        prompts: The prompts.
        where: Who needs the metadata, for the message.
        classes, colors: The known names; ``None`` if all are.

    Raises:
        UserError: If a prompt has none, or a clause that cannot be judged; the message names the first such prompt.
    """
    for prompt in prompts:
        if "include" not in prompt.metadata:
            raise UserError(f"prompt {prompt.text!r} has no GenEval metadata", where=where, remedy=REMEDY)
        tag = prompt.metadata.get("tag", TASKS[0])
        if tag not in TASKS:  # a misspelled "counting" would be judged with another threshold
            raise _wrong(prompt, where, f"tag is {tag!r}", f"use one of {', '.join(TASKS)}, or no tag")
        include, exclude = prompt.metadata["include"], prompt.metadata.get("exclude", [])
        for key, clauses in (("include", include), ("exclude", exclude)):
            if not isinstance(clauses, list) or (key == "include" and not clauses):
                raise _wrong(prompt, where, f"{key} is {clauses!r}", "use a list of clauses")
            for clause in clauses:
                _check_clause(prompt, where, key, clause, len(include), classes, colors)


def _check_clause(
    prompt: Prompt,
    where: str,
    kind: str,
    clause: Any,
    clauses: int,
    classes: Collection[str] | None,
    colors: Collection[str] | None,
) -> None:
    if not isinstance(clause, Mapping):
        raise _wrong(prompt, where, f"a clause is {clause!r}", "use an object with 'class' and 'count'")
    if unknown := sorted(clause.keys() - set(KEYS[kind]), key=str):  # "colour" would be judged as any color
        right = f"use {', '.join(KEYS[kind])}"
        raise _wrong(prompt, where, f"a clause of {kind} has an unknown key {unknown[0]!r}", right)
    name, count, color = clause.get("class"), clause.get("count"), clause.get("color")
    if not isinstance(name, str) or (classes is not None and name not in classes):
        right = "use a name" if classes is None else f"use one of {', '.join(classes)}"
        raise _wrong(prompt, where, f"class is {name!r}", right)
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise _wrong(prompt, where, f"count is {count!r}", "use an integer of at least 1")
    if color is not None and (not isinstance(color, str) or (colors is not None and color not in colors)):
        right = "use a name" if colors is None else f"use one of {', '.join(colors)}"
        raise _wrong(prompt, where, f"color is {color!r}", right)
    position = clause.get("position")
    if position is None and "position" not in clause:
        return
    if not (
        isinstance(position, list | tuple)
        and len(position) == 2
        and position[0] in RELATIONS
        and isinstance(position[1], int)
        and 0 <= position[1] < clauses
    ):
        right = f"use [relation, index of a clause], a relation being {', '.join(RELATIONS)}"
        raise _wrong(prompt, where, f"position is {position!r}", right)


def _wrong(prompt: Prompt, where: str, what: str, right: str) -> UserError:
    return UserError(f"in the GenEval metadata of prompt {prompt.text!r} {what}", where=where, remedy=right)
