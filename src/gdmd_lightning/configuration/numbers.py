"""Ranges of all numbers in a configuration, checked before anything is built, with the keys that a user types.

Constructors check them too, but know neither their place in a configuration nor that a later one will fail.
"""

from __future__ import annotations

from pydoc import locate
from typing import Any, get_args

from jsonargparse import Namespace

from gdmd_lightning.ranges import Seed, check_number, ranges_of


def check_configuration(settings: Any) -> None:
    """Check all numbers of a parsed configuration of ``fit``.

    Raises:
        UserError: If one is out of range; ``where`` is its key as a user types it.
    """
    from gdmd_lightning.data.prompt_data import PromptDataModule
    from gdmd_lightning.methods.base import DistillationModule

    check_numbers("model", DistillationModule, settings.model)
    check_numbers("data", PromptDataModule, settings.data)
    check_numbers("trainer", None, settings.trainer)
    if not isinstance(settings.seed_everything, bool):
        check_numbers("seed_everything", Seed, settings.seed_everything)


def check_options(options: Any, **hints: Any) -> None:
    """Check the parsed options of a command.

    Args:
        options: Their namespace.
        hints: Type of each option to check, by its name.

    Raises:
        UserError: If a number is out of range; ``where`` is its option.
    """
    for name, hint in hints.items():
        check_numbers(f"--{name}", hint, vars(options)[name])


def check_numbers(key: str, hint: Any, value: Any) -> None:
    """Check a parsed value, and everything inside it.

    Args:
        key: Dotted key of the value.
        hint: Its type.
        value: A plain value, a list of values, or the namespace of a class.

    Raises:
        UserError: If a number is out of range; ``where`` is its key.
    """
    if isinstance(value, Namespace):
        if "class_path" in value:
            hint, value = locate(value.class_path), value.get("init_args") or Namespace()
        kinds = [each for each in (hint, *get_args(hint)) if isinstance(each, type)]
        hints = {name: each for kind in kinds for name, each in ranges_of(kind).items()}
        for name, inner in vars(value).items():
            check_numbers(f"{key}.{name}", hints.get(name), inner)
    elif isinstance(value, list) and any(isinstance(each, Namespace) for each in value):
        for each in value:
            name = str(each.get("class_path", "")).rpartition(".")[2]
            check_numbers(f"{key}.{name}", None, each)
    else:
        check_number(key, hint, value)
