"""Sharded checkpoints: directories that all ranks write together, complete or absent, and that anyone can read.

    last.ckpt/
      manifest.json               number of ranks, the networks with the ranks' files, and a checksum of each file
      rest.ckpt                   everything that is not sharded, as torch saves it: tensors and plain values
      generator/00000.safetensors   what rank 0 holds of this network: a range of each parameter, with its moments

A piece is a range of one flattened parameter, so that any reader can put parameters together, whatever the number
of ranks and the ZeRO stage. Nothing here needs DeepSpeed, and nothing that is read can run code.
"""

from __future__ import annotations

import ctypes
import glob
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

MANIFEST, REST = "manifest.json", "rest.ckpt"
WEIGHT = "weight"
"""Key of the parameter itself among the tensors of a piece; the others are the optimizer's."""

_NETWORK = re.compile(r"[\w@-][\w.@-]*")
_EXCHANGE = 2  # RENAME_EXCHANGE of renameat2(2)
_HERE = -100  # AT_FDCWD


class ShardError(ValueError):
    """A sharded checkpoint that is damaged or does not fit, as one line."""


@dataclass(frozen=True)
class Piece:
    """A range of one flattened parameter on one rank.

    Args:
        name: The parameter's name in the LightningModule.
        shape: Shape of the whole parameter.
        start: Position of the first element in the flattened parameter.
        tensors: ``weight`` and the optimizer's moments of this range, each ``[N]``.
        scalars: The optimizer's numbers for this parameter, such as ``step``.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float] = field(default_factory=dict)


def write_pieces(directory: Path, rank: int, pieces: Iterable[Piece]) -> dict[str, int]:
    """Write the pieces that a rank holds of one network; returns the file's checksum by its name in the checkpoint."""
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {}
    for piece in pieces:
        index[piece.name] = {"shape": list(piece.shape), "start": piece.start, "scalars": dict(piece.scalars)}
        for key, tensor in piece.tensors.items():
            tensors[f"{key}:{piece.name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{rank:05d}.safetensors"
    save_file(tensors, path, metadata={"pieces": json.dumps(index)})
    # Now the system still has the file in memory, so this takes little next to the write.
    checksum = _checksum(path)
    _flush(path)
    return {f"{directory.name}/{path.name}": checksum}


def write_rest(
    directory: Path, rest: Mapping[str, Any], networks: Iterable[str], world_size: int, checksums: Mapping[str, int]
) -> None:
    """Write what is not sharded, and the manifest last.

    Args:
        directory: The checkpoint.
        rest: What is not sharded.
        networks: Names of the networks that have pieces.
        world_size: Number of ranks.
        checksums: What :func:`write_pieces` returned on all ranks.

    Raises:
        ShardError: If a network's name cannot be that of a directory.
    """
    for name in networks:
        if not _NETWORK.fullmatch(name):
            raise ShardError(f"{name!r} cannot be the name of a network in a checkpoint")
    with (directory / REST).open("wb") as file:
        torch.save(dict(rest), file)
    checksums = {**checksums, REST: _checksum(directory / REST)}
    _flush(directory / REST)
    manifest = {"format": 1, "world_size": world_size, "networks": list(networks), "checksums": checksums}
    (directory / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    _flush(directory / MANIFEST)


def publish(part: Path, path: Path) -> None:
    """Give a complete directory its final name, in the place of whatever has this name now.

    Where the system can exchange two names, there is no moment without a checkpoint; otherwise the previous one has
    another name, ``NAME.replaced.part``, between two renames.
    """
    if not os.path.lexists(path):
        part.rename(path)
    elif _exchange(part, path):
        _remove(part)
    else:
        old = path.with_name(f"{path.name}.replaced.part")
        _remove(old)
        path.rename(old)
        part.rename(path)
        _remove(old)
    _flush(path.parent)


def remove_parts(path: Path) -> None:
    """Remove what earlier, interrupted writes of ``path`` left behind."""
    for found in path.parent.glob(f"{glob.escape(path.name)}.*.part"):
        _remove(found)


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a sharded checkpoint."""
    return (Path(path) / MANIFEST).is_file()


class ShardedCheckpoint:
    """Reads a sharded checkpoint; tensors are read when they are asked for.

    A file's checksum is verified when the first tensor is read from it. The first sharded checkpoints have none.

    Args:
        path: The directory.

    Raises:
        ShardError: If it is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._verified: set[Path] = set()
        try:
            manifest = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
            self.world_size = int(manifest["world_size"])
            self.networks = [str(name) for name in manifest["networks"]]
            self.checksums = {str(name): int(value) for name, value in manifest.get("checksums", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ShardError(f"{str(path)!r} is not a sharded checkpoint: {_line(error)}") from error
        if self.world_size < 1 or not all(_NETWORK.fullmatch(name) for name in self.networks):
            raise ShardError(f"the {MANIFEST} in {str(path)!r} is malformed")

    def rest(self, *, verify: bool = True) -> dict[str, Any]:
        """Everything that is not sharded, on the CPU; its checksum is compared unless ``verify`` is false."""
        place = self.path / REST
        if verify:
            self._verify(place)
        try:
            content = torch.load(place, map_location="cpu", weights_only=True)
        except Exception as error:  # zip, pickle and torch raise a dozen unrelated types here
            raise ShardError(f"{str(place)!r} is not readable: {_line(error)}") from error
        if not isinstance(content, dict):
            raise ShardError(f"{str(place)!r} is {type(content).__name__}, not a dict")
        return content

    @cached_property
    def index(self) -> dict[str, list[_Range]]:
        """The pieces of each parameter, in the order of their ranges; checked to cover it exactly."""
        found: dict[str, list[_Range]] = {}
        for network in self.networks:
            for rank in range(self.world_size):
                for name, each in _pieces_in(self.path / network / f"{rank:05d}.safetensors"):
                    found.setdefault(name, []).append(each)
        for name, ranges in found.items():
            ranges.sort(key=lambda each: each.start)
            position = 0
            for each in ranges:
                if each.start != position or each.shape != ranges[0].shape:
                    raise ShardError(f"the pieces of {name} in {str(self.path)!r} do not fit together")
                position += each.numel
            if position != math.prod(ranges[0].shape):
                raise ShardError(f"{name} is incomplete in {str(self.path)!r}")
        return found

    def keys(self, name: str) -> set[str]:
        """What there is of a parameter: ``weight``, and the optimizer's moments if it is trained."""
        return set(self.index[name][0].keys)

    def scalars(self, name: str) -> dict[str, float]:
        """The optimizer's numbers for a parameter."""
        return self.index[name][0].scalars

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """A range of a parameter, or of one of its moments, ``[numel]``.

        Raises:
            ShardError: If there is no such parameter or key, or a file is damaged.
        """
        parts = []
        for each in self.index.get(name, []):
            low, high = max(start, each.start), min(start + numel, each.start + each.numel)
            if low < high:
                self._verify(each.file)
                with safe_open(each.file, "pt") as content:
                    part = content.get_slice(f"{key}:{name}")
                    parts.append(part[low - each.start : high - each.start])
        if sum(len(part) for part in parts) != numel:
            raise ShardError(f"{str(self.path)!r} has no {key} of {name}")
        return torch.cat(parts) if parts else torch.empty(0)

    def whole(self, name: str, key: str = WEIGHT) -> Tensor:
        """A whole parameter, or one of its moments, in the parameter's shape."""
        return self.read(name, key, 0, math.prod(self.shape(name))).reshape(self.shape(name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a parameter."""
        return self.index[name][0].shape

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters."""
        return {name: self.shape(name) for name in self.index}

    def _verify(self, file: Path) -> None:
        """Compare a file with its checksum, once."""
        if not self.checksums or file in self._verified:
            return
        try:
            found = _checksum(file)
        except OSError as error:
            raise ShardError(f"{str(file)!r} is damaged: {_line(error)}") from error
        if found != self.checksums.get(file.relative_to(self.path).as_posix()):
            raise ShardError(f"{str(file)!r} is damaged: its checksum does not match")
        self._verified.add(file)


@dataclass(frozen=True)
class _Range:
    file: Path
    shape: tuple[int, ...]
    start: int
    numel: int
    keys: tuple[str, ...]
    scalars: dict[str, float]


def _pieces_in(file: Path) -> Iterable[tuple[str, _Range]]:
    try:
        with safe_open(file, "pt") as content:
            sizes = {key: int(content.get_slice(key).get_shape()[0]) for key in content.keys()}  # noqa: SIM118
            index = json.loads(content.metadata()["pieces"])
        for name, each in index.items():
            keys = tuple(key.split(":", 1)[0] for key in sizes if key.split(":", 1)[1] == name)
            shape = tuple(int(size) for size in each["shape"])
            scalars = {str(key): float(value) for key, value in each["scalars"].items()}
            yield name, _Range(file, shape, int(each["start"]), sizes[f"{WEIGHT}:{name}"], keys, scalars)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ShardError(f"{str(file)!r} is damaged: {_line(error)}") from error


def consolidated(path: str | Path) -> dict[str, Any]:
    """A sharded checkpoint as the plain one that a single process would have written, in memory.

    The optimizers' states have the form of torch's, so that the result also resumes.

    Raises:
        ShardError: If the checkpoint is damaged.
    """
    reader = ShardedCheckpoint(path)
    checkpoint = reader.rest()
    weights = {name: reader.whole(name) for name in reader.index}
    checkpoint["state_dict"] = in_order(checkpoint.pop("names", []), {**checkpoint["state_dict"], **weights})
    for state, names in zip(checkpoint.get("optimizer_states", []), checkpoint.pop("trained_names", []), strict=False):
        state["state"] = {
            number: {
                **{key: torch.tensor(value) for key, value in reader.scalars(name).items()},
                **{key: reader.whole(name, key) for key in sorted(reader.keys(name) - {WEIGHT})},
            }
            for number, name in enumerate(names)
            if name in reader.index and len(reader.keys(name)) > 1
        }
    return checkpoint


def in_order(names: Iterable[str], tensors: dict[str, Any]) -> dict[str, Any]:
    """Tensors in the order of ``names``, others behind."""
    first = {name: tensors[name] for name in names if name in tensors}
    return {**first, **tensors}


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically; whether the system could."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def _checksum(path: Path) -> int:
    """CRC-32 of a file, as in the plain checkpoints of torch."""
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _flush(path: Path) -> None:
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
