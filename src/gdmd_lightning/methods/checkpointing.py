"""Checkpoints: written completely or not at all, read as plain values, and loaded only into the model they fit."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from gdmd_lightning.errors import UserError
from gdmd_lightning.files import atomic_file

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint says about its own origin.

    Args:
        configuration: The model part of the configuration, as YAML.
        prompts: Source of the training prompts.
        updates: Updates done.
        scores: Scores of the averaged generator at its last evaluation, by name.
    """

    configuration: str = ""
    prompts: str = ""
    updates: int = 0
    scores: dict[str, float] = field(default_factory=dict)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes checkpoints atomically, so that ``kill -9`` leaves the previous one.

    Lightning's own class writes through memory and the system's temporary directory, which may be on another file
    system, where a move is a copy.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        # Through Python's file, which says why a write failed; torch's own only says that it did.
        with atomic_file(Path(path)) as part, part.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """Load to the CPU, tensors and plain values only."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(str(path))


def read_checkpoint(path: str, *, in_memory: bool = True) -> dict[str, Any]:
    """Read a checkpoint of this project, tensors and plain values only.

    Args:
        path: The file.
        in_memory: Read the tensors now, instead of mapping them from disk when they are used.

    Raises:
        UserError: If there is no such file, or it is not a checkpoint.
    """
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path!r}", where="checkpoint", remedy="give the path of a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not in_memory)
    except Exception as error:  # zip, pickle and torch raise a dozen unrelated types here
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"{path!r} is not a readable checkpoint: {reason}", where="checkpoint") from error
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path!r} is not a Lightning checkpoint", where="checkpoint")
    return content


def check_fits(module: RoleModule, checkpoint: dict[str, Any]) -> None:
    """Fail if a checkpoint does not hold this module's roles in their shapes.

    Raises:
        UserError: If it does not; the message names the first tensor that differs.
    """
    mine, theirs = module.state_dict(), checkpoint["state_dict"]
    remedy = "use the configuration that the checkpoint was trained with, or start a new run with model.start_from"
    for name in [*mine, *(() if module.restricted else theirs)]:
        if name not in theirs or name not in mine:
            who = "the checkpoint" if name in mine else "this model"
            raise UserError(f"it is of another model: {who} has no {name}", where="checkpoint", remedy=remedy)
        if mine[name].shape != theirs[name].shape:
            shapes = f"{tuple(theirs[name].shape)} there, {tuple(mine[name].shape)} here"
            raise UserError(f"it is of another model: {name} is {shapes}", where="checkpoint", remedy=remedy)


def take_over(module: RoleModule, path: str) -> None:
    """Load roles of another run, possibly of another method.

    The checkpoint must contain the generator. A role that it lacks starts as usual: a trained one as the
    teacher, an average or snapshot as the role that it follows.

    Raises:
        UserError: If a role does not fit.
    """
    theirs, roles = read_checkpoint(path)["state_dict"], module.roles
    own = roles.state_dict()
    taken: dict[str, Any] = {}
    followers = []
    for spec in roles.specs:
        names = roles.names_of(spec.name)
        found = {name: theirs[f"roles.{name}"] for name in names if f"roles.{name}" in theirs}
        if not found and spec.name != "generator":
            followers += [spec] if spec.source is not None else []
            continue
        if len(found) < len(names) or any(found[name].shape != own[name].shape for name in found):
            raise UserError(
                f"its {spec.name} is not this model's",
                where=f"model.start_from {path!r}",
                remedy="use the same family, size and adapters (model.lora)",
            )
        taken |= found
    roles.load_state_dict(taken, strict=False)
    for spec in followers:
        roles.copy(str(spec.source), spec.name)
