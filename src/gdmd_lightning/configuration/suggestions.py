"""What would be right instead of a wrong key, class or value: the nearest valid one, or what is expected."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, get_args

MANY = 12
"""More names than this are not listed; a reader would not find the right one."""


@dataclass(frozen=True)
class Argument:
    """A valid key of a configuration.

    Args:
        type: Its annotation; ``None`` for a group of settings.
        default: Its default value.
    """

    type: Any = None
    default: object = None


Arguments = Mapping[str, Argument]
"""Arguments of a class or a command by dotted key, such as ``policy.form``."""


def nearest(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate that a mistyped word is most like, in any case; ``None`` if none is similar."""
    by_lower = {candidate.lower(): candidate for candidate in candidates}
    found = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.65)
    return by_lower[found[0]] if found else None


def did_you_mean(word: str, candidates: Iterable[str], name: str = "use one of") -> str:
    """The nearest candidate as a question; otherwise the list of them, or nothing if they are many."""
    names = sorted(candidates)
    if found := nearest(word, names):
        return f"did you mean {found!r}?"
    return f"{name}: {', '.join(names)}" if 0 < len(names) <= MANY else ""


def arguments_of(parser: Any) -> dict[str, Argument]:
    """The arguments of a parser, without those that show help."""
    return {
        action.dest: Argument(getattr(action, "_typehint", None), action.default)
        for action in parser._actions
        if action.dest.rpartition(".")[2] not in ("help", "print_config")
    }


def arguments_of_class(class_path: str) -> dict[str, Argument]:
    """The arguments of a class, also those that it passes on to its bases."""
    from jsonargparse import ArgumentParser

    module, _, name = class_path.rpartition(".")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(getattr(importlib.import_module(module), name))
    return arguments_of(parser)


def instead_of_key(key: str, arguments: Arguments, outside: str = "") -> str:
    """What could have been meant by an unknown dotted key.

    Keys of the same group come first: next to ``policy.form``, ``policy.from`` is more likely than ``lora.from``.

    Args:
        key: The unknown key.
        arguments: The valid ones.
        outside: What a person types before all of these keys.
    """
    group, _, last = key.rpartition(".")
    siblings = [name for name in arguments if name.rpartition(".")[0] == group]
    same = [name for name in arguments if name.rpartition(".")[2] == last]
    end = nearest(last, [name.rpartition(".")[2] for name in siblings])
    found = ".".join(filter(None, [group, end])) if end else nearest(key, same) or next(iter(same), None)
    if found is None and (whole := nearest(key, arguments)) and nearest(last, [whole.rpartition(".")[2]]):
        found = whole
    if found is not None:
        return f"did you mean {outside + found!r}?"
    if group and 0 < len(siblings) <= MANY:
        return f"{outside + group!r} has {', '.join(name.rpartition('.')[2] for name in siblings)}"
    return ""


def class_names(annotation: Any) -> list[str]:
    """Names of the known classes that an annotation accepts: those of this package and of Lightning."""
    names = set()
    for base in _classes(annotation):
        for found in _with_subclasses(base):
            if found.__module__.startswith(("gdmd_lightning.", "lightning.")) and not inspect.isabstract(found):
                names.add(found.__name__)
    return sorted(name for name in names if not name.startswith("_"))


def expectation(option: str, key: str, arguments: Arguments) -> tuple[str, str]:
    """What a key that takes a class or a group of settings expects, and an example.

    Args:
        option: The whole key, as typed after ``--``.
        key: The key in ``arguments``.
        arguments: Arguments that have this key.
    """
    settings = {name.removeprefix(f"{key}."): a.default for name, a in arguments.items() if name.startswith(f"{key}.")}
    annotation = arguments[key].type if key in arguments else None
    found = [base for base in _classes(annotation) if is_dataclass(base)]
    if not settings and found and not any(base.__subclasses__() for base in found):
        settings = {field.name: field.default for base in found for field in fields(base)}
    if settings:
        plain = {name: value for name, value in settings.items() if isinstance(value, int | float | str)}
        first = next(iter(plain), next(iter(settings)))
        return f"settings ({', '.join(settings)})", f"--{option}.{first} {plain.get(first, 'VALUE')}"
    names = class_names(annotation)
    bases = " or ".join(base.__name__ for base in _classes(annotation)) or "class"
    listed = f": {', '.join(names)}" if 0 < len(names) <= MANY else ""
    return f"the name of a {bases} class{listed}", f"--{option} {names[0] if names else 'my_module.MyClass'}"


def _classes(annotation: Any) -> list[type]:
    """The classes in an annotation that are not plain values or containers."""
    parts = get_args(annotation)
    if parts:
        return [found for part in parts for found in _classes(part)]
    if inspect.isclass(annotation) and annotation.__module__ not in ("builtins", "collections.abc", "typing"):
        return [annotation]
    return []


def _with_subclasses(base: type) -> set[type]:
    children: list[type] = base.__subclasses__()
    return {base, *(found for child in children for found in _with_subclasses(child))}
