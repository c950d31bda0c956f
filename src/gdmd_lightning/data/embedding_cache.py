"""Embeddings of prompts on disk: a directory of safetensors shards that processes share and crashes leave whole.

A shard is written beside its place and moved there, and never changed afterwards. The index is the shards' own
headers, so no second file can disagree with them; each names the model that it is of.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import Conditioning

FIELDS = ("sequence", "pooled", "ids")
FINGERPRINT = "text_fingerprint"
DAY = 24 * 3600


@dataclass(frozen=True)
class EmbeddingCache:
    """Where and how the prompts of a run are embedded before it trains.

    Args:
        directory: Where the embeddings stand; all processes must see it, and other runs of the model may share it.
        batch_size: Prompts encoded at once.
        shard_size: Prompts a file; that many are in memory while they are written.
        most: Distinct prompts that may be embedded ahead; a source with more is refused before anything is encoded.
        free_encoders: Drop the text encoders once all is embedded.

    Raises:
        UserError: If the directory has no name, or a number is below 1.
    """

    directory: str
    batch_size: int = 16
    shard_size: int = 64
    most: int = 100_000
    free_encoders: bool = True

    def __post_init__(self) -> None:
        if not str(self.directory).strip():
            raise UserError("no directory", where="embedding_cache.directory", remedy="name one that may be written")
        for name in ("batch_size", "shard_size", "most"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"{name} is {getattr(self, name)}", where=f"embedding_cache.{name}", remedy="it must be at least 1"
                )


class EmbeddingStore:
    """The embeddings of one model's prompts in a directory; its files are read when a prompt is asked for.

    A prompt that two runs wrote at the same time is read from the earlier shard, by every process.

    Args:
        directory: Where the shards stand; made where there is none.
        fingerprint: Of the model, see :meth:`ModelFamily.text_fingerprint`.
        rank: This process among those that write.

    Raises:
        UserError: If the directory cannot be used, a shard is broken, or it holds embeddings of another model.
    """

    def __init__(self, directory: str, fingerprint: str, rank: int = 0) -> None:
        self.directory, self.fingerprint, self.rank = Path(directory).expanduser(), fingerprint, rank
        self._indexed: set[str] = set()
        self._places: dict[str, Path] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._clear_leftovers()
        except OSError as error:
            raise self._unwritable(error) from error
        self.refresh()

    def __contains__(self, text: str) -> bool:
        return f"{key_of(text)}.{FIELDS[0]}" in self._places

    def missing(self, texts: Iterable[str]) -> list[str]:
        """Those of the texts that are not there."""
        return [text for text in texts if text not in self]

    def refresh(self) -> None:
        """Take note of the shards that any process has written since.

        Raises:
            UserError: If one is broken or of another model.
        """
        for path in sorted(self.directory.glob("*.safetensors")):
            if path.name in self._indexed:
                continue
            header = read_header(path)
            found = header.pop("__metadata__", {}).get(FINGERPRINT)
            if found != self.fingerprint:
                what = "embeddings of another model, or of other settings of its text encoders"
                raise UserError(
                    f"holds {what if found else 'safetensors files that are no embeddings of prompts'}",
                    where=str(self.directory),
                    remedy="give embedding_cache.directory a directory of its own",
                )
            for name in header:
                # A shard's name begins with its time, so the lesser one is the earlier.
                self._places[name] = min(self._places.get(name, path), path)
            self._indexed.add(path.name)

    def read(self, text: str, device: torch.device) -> Conditioning:
        """The embedding of a text that is there, one row, equal to the bit to what was written.

        Raises:
            UserError: If its file has been removed or damaged meanwhile.
        """
        from safetensors import SafetensorError, safe_open

        key = key_of(text)
        path = self._places[f"{key}.{FIELDS[0]}"]
        try:
            with safe_open(path, "pt") as file:
                # Copied, since a tensor that still stood in the file would need the file for as long as it lives.
                parts = {
                    field: file.get_tensor(f"{key}.{field}").to(device, copy=True)
                    for field in FIELDS
                    if f"{key}.{field}" in self._places
                }
        except (OSError, SafetensorError) as error:
            raise _broken(path, str(error)) from error
        return Conditioning(**parts)

    def write(self, rows: Mapping[str, Conditioning]) -> None:
        """Write the embeddings of some texts, one row each, as one shard: whole, or not at all.

        Raises:
            UserError: If the disk is full or cannot be written; what was written before stays.
        """
        from safetensors.torch import save

        named = {
            f"{key_of(text)}.{field}": getattr(row, field)
            for text, row in rows.items()
            for field in FIELDS
            if getattr(row, field) is not None
        }
        # As bytes, and by a plain write: safetensors' own goes through mapped memory, where a full disk is no error
        # but the end of the process. Cloned, since it refuses rows of one batch.
        content = save(
            {name: part.detach().cpu().clone(memory_format=torch.contiguous_format) for name, part in named.items()},
            {FINGERPRINT: self.fingerprint},
        )
        part = self.directory / f"{self.rank:05d}.{os.getpid()}.{socket.gethostname()}.part"
        try:
            try:
                with part.open("wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(part, self.directory / f"{time.time_ns():020d}-{self.rank:05d}.safetensors")
            finally:
                part.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritable(error, len(content)) from error
        self.refresh()

    def check_room(self, count: int, bytes_each: int) -> None:
        """See that the disk has room for so many more prompts.

        Raises:
            UserError: If it has not.
        """
        free = shutil.disk_usage(self.directory).free
        if count * bytes_each > free:
            raise UserError(
                f"{count:,} prompts of {size(bytes_each)} each need {size(count * bytes_each)}; {size(free)} are free",
                where=str(self.directory),
                remedy="free some, or give embedding_cache.directory a directory on another disk",
            )

    def _clear_leftovers(self) -> None:
        """Remove what earlier processes of this rank were writing when they died; another run's may be alive."""
        for part in self.directory.glob(f"{self.rank:05d}.*.part"):
            named = re.fullmatch(r"\d+\.(\d+)\.(.+)\.part", part.name)
            with suppress(FileNotFoundError):
                dead = named and named[2] == socket.gethostname() and not _alive(int(named[1]))
                if dead or time.time() - part.stat().st_mtime > DAY:
                    part.unlink()

    def _unwritable(self, error: OSError, count: int | None = None) -> UserError:
        reason = error.strerror or str(error)
        if error.errno == errno.EFBIG:
            reason = f"{reason} (a limit on the size of files)"
        return UserError(
            f"cannot write {'here' if count is None else size(count)}: {reason}",
            where=str(self.directory),
            remedy="what was written before is whole and will be used; give it room, or name another directory",
        )


def key_of(text: str) -> str:
    """The name of a text in a shard."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def size(count: int) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


def read_header(path: Path) -> dict[str, Any]:
    """What a safetensors file says of its tensors, read without them.

    Raises:
        UserError: If the file is not whole.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            there = os.fstat(file.fileno()).st_size
            if 8 + length > there:
                raise ValueError(f"{there} bytes are shorter than its header")
            header = json.loads(file.read(length))
        needed = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if there != needed:
            raise ValueError(f"it has {there} bytes and not the {needed} of its header")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _broken(path, str(error)) from error
    return header


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"is no whole safetensors file ({reason})",
        where=str(path),
        remedy="remove this file; its prompts will be encoded again",
    )


def _alive(pid: int) -> bool:
    """Whether another process of this number runs here; our own has nothing half-written when it asks."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
