"""Checkpoints: written completely or not at all, read as plain values, and loaded only into the model they fit."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.files import atomic_file, files_digest
from gdmd_lightning.strategies.shards import ShardedCheckpoint, ShardError, consolidated, is_sharded

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule

PARTS = {
    "state_dict": dict, "loops": dict, "callbacks": dict, "optimizer_states": list, "lr_schedulers": list,
    "epoch": int, "global_step": int, "pytorch-lightning_version": str,
}  # fmt: skip
"""Types of a checkpoint's parts that Lightning itself reads unchecked."""


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
        path: The file, or the directory that several ranks wrote, whose tensors are put together.
        in_memory: Read the tensors now and verify their checksums, which takes about a second per GB. Otherwise map
            them from disk when they are used, unverified; of a directory, leave out what is in shards.

    Raises:
        UserError: If there is no such file, it is not a checkpoint, or it is damaged.
    """
    if is_sharded(path):
        return _read_sharded(path, in_memory)
    if not Path(path).is_file():
        raise UserError(f"no checkpoint {path!r}", where="checkpoint", remedy="give the path of a .ckpt file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not in_memory)
    except Exception as error:  # zip, pickle and torch raise a dozen unrelated types here
        reason = str(error).split("\n")[0].split(". ")[0] or type(error).__name__
        raise UserError(f"{path!r} is not a readable checkpoint: {reason}", where="checkpoint") from error
    if in_memory:
        _verify_checksums(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise UserError(f"{path!r} is not a Lightning checkpoint", where="checkpoint")
    _check_parts(content, path)
    return content


def _read_sharded(path: str, in_memory: bool) -> dict[str, Any]:
    try:
        content = consolidated(path) if in_memory else ShardedCheckpoint(path).rest(verify=False)
    except ShardError as error:
        raise _damaged(error) from error
    if not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{path!r} is not a Lightning checkpoint", where="checkpoint")
    _check_parts(content, path)
    return content


def _damaged(error: ShardError) -> UserError:
    return UserError(str(error), where="checkpoint", remedy="use another checkpoint of this run")


def _check_parts(content: dict[str, Any], path: str) -> None:
    """Fail if a part of a checkpoint has another type than Lightning's, or a weight is no tensor.

    Raises:
        UserError: The message names the part.
    """
    for name, kind in PARTS.items():
        # A bool is an int for isinstance.
        if name in content and (not isinstance(content[name], kind) or isinstance(content[name], bool)):
            there = type(content[name]).__name__
            what = f"the {name} in {path!r} is {there}, not {kind.__name__}"
            raise UserError(what, where="checkpoint", remedy="use a .ckpt written by fit")
    for name, value in content["state_dict"].items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            what = f"the state_dict in {path!r} has {type(value).__name__} for {str(name)[:80]!r}, not a tensor"
            raise UserError(what, where="checkpoint", remedy="use a .ckpt written by fit")


def _verify_checksums(path: str) -> None:
    """Compare the file's content with the checksums in it; torch writes them, but does not check them.

    Raises:
        UserError: If they differ.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
        raise UserError(f"{path!r} is damaged: {error}", where="checkpoint", remedy="use another checkpoint") from error
    if damaged is not None:
        what = f"{path!r} is damaged: the checksum of {damaged!r} does not match"
        raise UserError(what, where="checkpoint", remedy="use another checkpoint of this run")


def content_digest(path: str) -> str:
    """Digest of a checkpoint's content: of a file from the checksums in its zip directory, without reading tensors.

    Raises:
        UserError: If the file does not exist or is not a checkpoint.
    """
    read_checkpoint(path, in_memory=False)
    if is_sharded(path):
        return files_digest(Path(path), (each for each in Path(path).rglob("*") if each.is_file()))
    with zipfile.ZipFile(path) as archive:
        parts = [f"{part.filename} {part.file_size} {part.CRC}" for part in archive.infolist()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=8).hexdigest()


def check_fits(module: RoleModule, checkpoint: dict[str, Any]) -> None:
    """Fail if a checkpoint does not hold this module's roles in their shapes.

    Merged adapters that it has in addition to the declared roles are built in the module.

    Raises:
        UserError: If it does not, and the message names the first tensor that differs; or if it is damaged.
    """
    module.roles.adopt({name.removeprefix("roles."): value for name, value in checkpoint["state_dict"].items()})
    mine = module.shapes()
    theirs = {name: tuple(value.shape) for name, value in checkpoint["state_dict"].items()}
    if "sharded" in checkpoint:
        try:
            theirs |= ShardedCheckpoint(checkpoint["sharded"]).shapes()
        except ShardError as error:
            raise _damaged(error) from error
    remedy = "use the configuration that the checkpoint was trained with, or start a new run with model.start_from"
    for name in [*mine, *(() if module.restricted else theirs)]:
        if name not in theirs or name not in mine:
            who = "the checkpoint" if name in mine else "this model"
            raise UserError(f"it is of another model: {who} has no {name}", where="checkpoint", remedy=remedy)
        if mine[name] != theirs[name]:
            shapes = f"{theirs[name]} there, {mine[name]} here"
            raise UserError(f"it is of another model: {name} is {shapes}", where="checkpoint", remedy=remedy)
