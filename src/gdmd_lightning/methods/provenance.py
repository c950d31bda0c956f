"""What a checkpoint says about its own origin, checked before anything relies on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import yaml
from jsonargparse import Namespace

from gdmd_lightning.errors import UserError


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint says about its own origin.

    Args:
        configuration: The model part of the configuration, as YAML.
        prompts: Source of the training prompts.
        updates: Updates done.
        evaluations: Network evaluations in these updates.
        scores: Scores of the averaged generator at its last evaluation, by name.
        teacher: Digest of the teacher's weights, see :func:`weights_fingerprint`.
        started_from: Digest of the checkpoint that the run started from.
        settings: Settings that a resumed run cannot change, see :func:`fixed_settings`.
        reward: Name of the reward.
    """

    configuration: str = ""
    prompts: str = ""
    updates: int = 0
    evaluations: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    teacher: str = ""
    started_from: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    reward: str = ""


def read_provenance(checkpoint: Mapping[str, Any]) -> Provenance:
    """The provenance in a checkpoint; what an earlier version did not write is empty.

    Raises:
        UserError: If it is missing, a field has the wrong type, or a field is unknown.
    """
    found = checkpoint.get("provenance")
    if not isinstance(found, dict):
        what = "there is none" if found is None else f"it is {type(found).__name__}"
        raise _malformed("provenance", what, "use a .ckpt written by fit")
    known = {each.name: type(getattr(Provenance(), each.name)) for each in fields(Provenance)}
    for name, value in found.items():
        if name not in known:
            raise _malformed(f"provenance {str(name)[:80]!r}", "unknown field", "a newer version may have written it")
        # isinstance would accept True as a number of updates.
        if type(value) is not known[name]:
            raise _malformed(f"provenance {name!r}", f"it is {type(value).__name__}, not {known[name].__name__}")
    for name, value in found.get("scores", {}).items():
        if not isinstance(name, str) or type(value) not in (int, float):
            raise _malformed("provenance 'scores'", "not all of them are numbers by name")
    for name in ("updates", "evaluations"):
        if found.get(name, 0) < 0:
            raise _malformed(f"provenance {name!r}", f"it is {found[name]}")
    return Provenance(**found)


def parsed(configuration: str) -> Any:
    """The content of a provenance's configuration, as plain values.

    Raises:
        UserError: If it is not YAML.
    """
    try:
        return yaml.safe_load(configuration)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        # Deep nesting and numbers of thousands of digits end in the last two.
        raise _malformed("cannot parse the configuration", " ".join(str(error).split())[:200]) from error


def _malformed(part: str, what: str, remedy: str = "the file is damaged or was changed") -> UserError:
    return UserError(f"{part}: {what}", where="checkpoint", remedy=remedy)


def named_classes(settings: Any) -> Iterator[str]:
    """Every ``class_path`` in a parsed configuration."""
    if isinstance(settings, list | tuple):
        for each in settings:
            yield from named_classes(each)
    elif isinstance(settings, Namespace | dict):
        for name, value in (vars(settings) if isinstance(settings, Namespace) else settings).items():
            if name == "class_path" and isinstance(value, str):
                yield value
            else:
                yield from named_classes(value)
