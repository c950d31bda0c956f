"""Checkpoints: written whole or not at all, read as plain values, and only into the model that they are of."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from gdmd_lightning.errors import UserError

if TYPE_CHECKING:
    from gdmd_lightning.methods.base import DistillationModule


@dataclass(frozen=True)
class Provenance:
    """What a checkpoint tells of its own origin.

    Args:
        configuration: The module's part of the configuration, as YAML.
        prompts: The data's source.
        updates: Generator updates done.
        scores: Of the averaged generator at its last evaluation, by name.
    """

    configuration: str = ""
    prompts: str = ""
    updates: int = 0
    scores: dict[str, float] = field(default_factory=dict)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside its place, then moves it there, so that ``kill -9`` leaves the one before.

    Lightning's own goes through the system's temporary directory, from which a move is a copy where that is another
    file system, and through memory.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """See :class:`CheckpointIO`."""
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        place = Path(path)
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(place.name + ".part")
        with fresh.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, place)

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> Any:
        """See :class:`CheckpointIO`; onto the CPU, tensors and plain values only."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(str(path))


def read_checkpoint(path: str, *, in_memory: bool = True) -> dict[str, Any]:
    """A checkpoint of this project, tensors and plain values only.

    Args:
        path: The file.
        in_memory: Read the tensors, instead of leaving them on the disk until they are used.

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


def check_fits(module: DistillationModule, checkpoint: dict[str, Any]) -> None:
    """See that a checkpoint holds this module's roles in their shapes.

    Raises:
        UserError: Naming the first thing that differs.
    """
    mine, theirs = module.state_dict(), checkpoint["state_dict"]
    remedy = "use the configuration that the checkpoint was trained with, or model.start_from to start anew from it"
    for name in [*mine, *theirs]:
        if name not in theirs or name not in mine:
            who = "the checkpoint" if name in mine else "this model"
            raise UserError(f"it is of another model: {who} has no {name}", where="checkpoint", remedy=remedy)
        if mine[name].shape != theirs[name].shape:
            shapes = f"{tuple(theirs[name].shape)} there, {tuple(mine[name].shape)} here"
            raise UserError(f"it is of another model: {name} is {shapes}", where="checkpoint", remedy=remedy)


def take_over(module: DistillationModule, path: str) -> None:
    """Start from another run's generator and fake score; averages and snapshots it lacks start as their present.

    Raises:
        UserError: If the checkpoint does not fit.
    """
    theirs, roles = read_checkpoint(path)["state_dict"], module.networks
    own, taken = roles.state_dict(), {}
    for role in ("generator", "fake_score", "ema"):
        for name in roles.names_of(role):
            found = theirs.get(f"roles.{name}")
            if found is None or found.shape != own[name].shape:
                raise UserError(
                    f"its {role} is not this model's",
                    where=f"model.start_from {path!r}",
                    remedy="use the same family, size and adapters (model.lora)",
                )
            taken[name] = found
    roles.load_state_dict(taken, strict=False)
    roles.restart_old()
    for slot in range(roles.slots):
        roles.keep_snapshot(slot)
