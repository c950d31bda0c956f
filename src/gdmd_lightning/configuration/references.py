"""Texts that a configuration takes from the environment stay references in everything that a run writes.

``${oc.env:TOKEN}`` is resolved when it is parsed. Saved as parsed, a secret would be in ``config.yaml`` and in every
checkpoint. A number has its value there: it equals other settings that are no references.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities import LightningEnum
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from gdmd_lightning.errors import UserError

ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_]\w*)")
SECRET = 8
"""Values of at least this length are also replaced inside longer texts."""

# The default of ``Timer.interval`` is an enumeration's member, which yaml would refuse to write.
yaml.SafeDumper.add_multi_representer(LightningEnum, lambda dumper, word: dumper.represent_str(word.value))


class ReferencingParser(LightningArgumentParser):
    """A parser that writes references instead of the values that came from the environment.

    It takes no abbreviated keys; jsonargparse builds the parsers of nested classes from its type.

    Attributes:
        references: What to write for each value, see :func:`environment_references`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.references: dict[str, str] = {}

    def dump(self, *args: Any, **kwargs: Any) -> str:
        """As jsonargparse's, with references."""
        return with_references(str(super().dump(*args, **kwargs)), self.references)


def environment_references(arguments: Sequence[str]) -> dict[str, str]:
    """The references in arguments and in the configuration files that they name, by the value that they stand for."""
    found: dict[str, str] = {}
    for text in _texts(arguments):
        for name in ENVIRONMENT.findall(text):
            if os.environ.get(name):
                found.setdefault(os.environ[name], f"${{oc.env:{name}}}")
        if ENVIRONMENT.search(text):
            try:
                found[str(OmegaConf.create({"value": text}).value)] = text
            except OmegaConfBaseException:
                continue  # it also refers to other keys; the variables in it are listed above
    return found


def with_environment(argument: str) -> str:
    """An argument with the variables in it replaced; the parser does that in configuration files only.

    Raises:
        InterpolationResolutionError: If a variable is not set.
    """
    if not ENVIRONMENT.search(argument):
        return argument
    key, sign, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
    name = key.lstrip("-")  # an error says it
    try:
        return f"{key}{sign}{OmegaConf.create({name: value})[name]}"
    except InterpolationKeyError:
        return argument  # it also refers to other keys


def with_references(text: str, references: dict[str, str]) -> str:
    """Replace values in a configuration by what they were taken from.

    Args:
        text: The configuration as YAML.
        references: See :func:`environment_references`.
    """
    if not any(value in text for value in references):
        return text
    header = "".join(f"{line}\n" for line in text.splitlines() if line.startswith("#"))
    return header + yaml.safe_dump(_replaced(yaml.safe_load(text), references), sort_keys=False, allow_unicode=True)


def resolved(settings: dict[str, Any], path: str) -> dict[str, Any]:
    """A checkpoint's settings with the references to environment variables replaced by their values.

    Raises:
        UserError: If a variable is not set.
    """
    if not any("${" in text for text in _strings(settings)):
        return settings
    try:
        container: Any = OmegaConf.to_container(OmegaConf.create(settings), resolve=True)
    except OmegaConfBaseException as error:
        what = f"its configuration cannot be resolved: {str(error).splitlines()[0]}"
        raise UserError(what, where=f"checkpoint {path!r}", remedy="set the environment variable") from error
    return dict(container)


def _texts(arguments: Sequence[str]) -> Iterator[str]:
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("-") else argument
        yield value
        file = Path(value)
        if file.suffix in (".yaml", ".yml", ".json") and file.is_file():
            yield from _strings(yaml.safe_load(file.read_text(encoding="utf-8")))


def _strings(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        for value in settings.values():
            yield from _strings(value)
    elif isinstance(settings, list):
        for value in settings:
            yield from _strings(value)
    elif isinstance(settings, str):
        yield settings


def _replaced(settings: Any, references: dict[str, str]) -> Any:
    if isinstance(settings, dict):
        return {key: _replaced(value, references) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_replaced(value, references) for value in settings]
    if not isinstance(settings, str):
        return settings
    if settings in references:
        return references[settings]
    for value, reference in references.items():
        if len(value) >= SECRET:
            settings = settings.replace(value, reference)
    return settings
