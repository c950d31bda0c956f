"""The arguments of ``fit`` that can be checked before anything heavy is imported: configurations and first keys."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from gdmd_lightning.configuration.messages import shortened
from gdmd_lightning.configuration.suggestions import did_you_mean, nearest
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import find_config

SECTIONS = ("config", "seed_everything", "trainer", "model", "data", "ckpt_path", "weights_only")
"""What the keys of ``fit`` start with."""
LISTS = ("trainer.callbacks", "trainer.logger", "trainer.plugins")
"""Keys that can hold a list of classes."""


def with_found_configs(arguments: Sequence[str], sections: Iterable[str] | None = None) -> list[str]:
    """Replace every ``--config NAME`` in the arguments by the path of that configuration.

    Args:
        arguments: Arguments of a command.
        sections: What keys of a configuration may start with; ``None`` for anything.

    Raises:
        UserError: If there is no such configuration, it is not a YAML mapping, or one of its keys starts otherwise.
    """
    out: list[str] = []
    for argument in arguments:
        if out and out[-1] in ("--config", "-c"):
            argument = _checked(find_config(argument), sections)
        elif argument.startswith("--config="):
            argument = f"--config={_checked(find_config(argument.removeprefix('--config=')), sections)}"
        out.append(argument)
    return out


def fit_arguments(arguments: Sequence[str], command: str = "fit") -> list[str]:
    """Check what can be checked of ``fit``'s arguments without importing what they configure.

    Args:
        arguments: As given.
        command: The command whose ``--help`` an error points to.

    Returns:
        The arguments, with configurations found, and in which a list of classes replaces an earlier one.

    Raises:
        UserError: If a configuration is missing or broken, or an argument starts with no section of ``fit``.
    """
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        option = argument.removeprefix("--").partition("=")[0]
        section = option.partition(".")[0].removesuffix("+")
        if section not in (*SECTIONS, "help", "print_config"):
            meant = nearest(section, SECTIONS)
            hint = f"did you mean '--{meant}'?" if meant else f"options start with --{', --'.join(SECTIONS)};"
            raise UserError(f"unknown option '--{option}'", where=command, remedy=f"{hint} see {command} --help")
    return _with_whole_lists(with_found_configs(arguments, SECTIONS))


def _with_whole_lists(arguments: Sequence[str]) -> list[str]:
    """Clear lists of classes before an argument that gives them again.

    jsonargparse lets an item of the same class at the same place of an earlier list, if that is as long, pass on its
    settings. Each of :data:`LISTS` can be null. Others cannot, so their argument comes twice, first with empty lists.
    """
    out: list[str] = []
    known: dict[str, int] = {}
    for place, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        name = "" if option in ("-c", "--config") else option.removeprefix("--")
        if option.startswith("-") and not name.endswith("+") and (equals or place + 1 < len(arguments)):
            given = value if equals else arguments[place + 1]
            # Any file can be the value of another key, such as a checkpoint.
            content = _content(given, file=name in ("", *LISTS) or given.endswith((".yaml", ".yml")))
            keys = [key for key in LISTS if not name or f"{key}.".startswith(f"{name}.")]
            out += [f"--{key}=null" for key in keys if isinstance(_at(content, key.removeprefix(name)), list)]
            whole = {name: content} if name or not isinstance(content, dict) else content
            for key, part in whole.items():
                emptied = _emptied(part, str(key), known)
                if emptied != part:
                    out.append(f"--{key}={yaml.safe_dump(emptied, default_flow_style=True, width=math.inf).strip()}")
        out.append(argument)
    return out


def _emptied(content: object, key: str, known: dict[str, int]) -> object:
    """A copy of what stands at a dotted key, without the items of lists of classes that are as long as known ones.

    Args:
        content: Any value of YAML; what is in :data:`LISTS`, or in items of lists, stays.
        key: Where it stands.
        known: Lengths of the lists of classes so far, by key; those of this content are added.
    """
    if key in LISTS:
        return content
    if isinstance(content, dict):
        below = {part: key if part == "init_args" else f"{key}.{part}" for part in content}
        return {part: _emptied(value, below[part], known) for part, value in content.items()}
    if isinstance(content, list) and any(map(_is_class, content)):
        # What is given for the last item of one of LISTS can stand anywhere in it.
        again = known.get(key) == len(content) or key.startswith(tuple(f"{each}." for each in LISTS))
        known[key] = len(content)
        return [] if again else content
    return content


def _is_class(item: object) -> bool:
    """Whether an item of a list is a class, with its settings or by its name alone."""
    if isinstance(item, dict):
        return "class_path" in item
    return isinstance(item, str) and item.replace(".", "_").isidentifier() and item.rpartition(".")[2][:1].isupper()


def _content(given: str, *, file: bool) -> object:
    """The value of an argument, or of the file that it names if it can name one."""
    try:
        return yaml.safe_load(Path(given).read_text(encoding="utf-8") if file and os.path.isfile(given) else given)
    except (OSError, ValueError, yaml.YAMLError):
        return None  # the parser says what is wrong with it


def _at(content: object, key: str) -> object:
    """What stands below a dotted key; None if nothing does."""
    for part in filter(None, key.split(".")):
        content = content.get(part) if isinstance(content, dict) else None
    return content


def _checked(path: str, sections: Iterable[str] | None) -> str:
    """Return the path if the file holds a YAML mapping; the parser's own message would name no file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        content, twice = yaml.safe_load(text), _repeated(yaml.compose(text, yaml.SafeLoader))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"not a readable YAML file: {shortened(error)}", where=path) from error
    if twice is not None:
        what = f"the key {twice.value!r} stands there twice, again in line {twice.start_mark.line + 1}"
        raise UserError(what, where=path, remedy="keep one: the last alone would count")
    if not isinstance(content, dict):
        remedy = "write 'key: value' lines, as fit --print_config does"
        raise UserError("the file has no keys", where=path, remedy=remedy)
    valid = list(content if sections is None else sections)
    for key in content:
        if key not in valid:
            raise UserError(f"unknown key {str(key)!r}", where=path, remedy=did_you_mean(str(key), valid))
    return path


def _repeated(node: yaml.Node | None) -> yaml.ScalarNode | None:
    """The first key that repeats another one of the same mapping, anywhere below a node."""
    below: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        known: set[str] = set()
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in known:
                return key
            known.add(str(key.value))
            below.append(value)
    elif isinstance(node, yaml.SequenceNode):
        below = node.value
    return next(filter(None, map(_repeated, below)), None)
