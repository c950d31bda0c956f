"""Embeddings of prompts on disk: a directory of safetensors shards, shared by processes, safe after crashes.

A shard is written under a temporary name, renamed when complete, and never changed afterwards. There is no
index file that could disagree with the shards: the index is read from their headers, which also hold the
fingerprint of the model.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError, WriteError
from gdmd_lightning.files import atomic_file, remove_leftovers
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.ranges import Count, ranged

FIELDS = ("sequence", "pooled", "ids")
FINGERPRINT = "text_fingerprint"


@ranged
@dataclass(frozen=True)
class EmbeddingCache:
    """Settings for embedding all prompts of a run before training starts.

    Args:
        directory: Directory of the embeddings. All processes must see the same one; other runs of the same
            model may share it.
        batch_size: Prompts encoded at once.
        shard_size: Prompts per file; as many embeddings are in memory while a file is written.
        most: Maximum number of distinct prompts. A source with more is refused before anything is encoded.
        free_encoders: Free the text encoders after all prompts are embedded.

    Raises:
        UserError: If the directory is empty.
    """

    directory: str
    batch_size: Count = 16
    shard_size: Count = 64
    most: Count = 100_000
    free_encoders: bool = True

    def __post_init__(self) -> None:
        if not str(self.directory).strip():
            raise UserError("no directory", where="embedding_cache.directory", remedy="name a writable directory")


class EmbeddingStore:
    """Embeddings of one model's prompts in a directory; embeddings are read from disk on request.

    If two runs wrote the same prompt at the same time, every process reads it from the earlier shard.

    Args:
        directory: Directory of the shards; created if missing.
        fingerprint: The model's :meth:`ModelFamily.text_fingerprint`.
        rank: Rank of this process among those that write.

    Raises:
        UserError: If the directory cannot be used, a shard is broken, or it belongs to another model.
    """

    def __init__(self, directory: str, fingerprint: str, rank: int = 0) -> None:
        self.directory, self.fingerprint, self.rank = Path(directory).expanduser(), fingerprint, rank
        self._indexed: set[str] = set()
        self._places: dict[str, Path] = {}
        self._checksums: dict[tuple[Path, str], str] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._unnamed)
        except OSError as error:
            raise self._unwritable(error) from error
        self.refresh()

    def __contains__(self, text: str) -> bool:
        return f"{key_of(text)}.{FIELDS[0]}" in self._places

    def missing(self, texts: Iterable[str]) -> list[str]:
        """The texts whose embeddings are not in the store, in their order."""
        return [text for text in texts if text not in self]

    def refresh(self) -> None:
        """Index the shards that any process has written since the last call.

        Raises:
            UserError: If a shard is broken or belongs to another model.
        """
        for path in sorted(self.directory.glob("*.safetensors")):
            if path.name in self._indexed:
                continue
            header = read_header(path)
            metadata = header.pop("__metadata__", {})
            found = metadata.get(FINGERPRINT)
            if found != self.fingerprint:
                what = "embeddings of another model, or of other settings of its text encoders"
                raise UserError(
                    f"contains {what if found else 'safetensors files that are not embeddings of prompts'}",
                    where=str(self.directory),
                    remedy="set embedding_cache.directory to a separate directory",
                )
            for name in header:
                # Shard names begin with the time of writing, so the smaller name is the earlier shard.
                self._places[name] = min(self._places.get(name, path), path)
                if name in metadata:
                    self._checksums[path, name] = metadata[name]
            self._indexed.add(path.name)

    def read(self, text: str, device: torch.device) -> Conditioning:
        """Read the embedding of a text in the store: one row, bitwise equal to what was written.

        Every row is compared with its checksum, which takes about a millisecond per MB. Shards of earlier versions
        have none.

        Raises:
            UserError: If its file has been removed or damaged since it was written, or has rows of another shape.
        """
        from safetensors import SafetensorError, safe_open

        key = key_of(text)
        path = self._places[f"{key}.{FIELDS[0]}"]
        parts = {}
        try:
            with safe_open(path, "pt") as file:
                for field in FIELDS:
                    if f"{key}.{field}" in self._places:
                        row = file.get_tensor(f"{key}.{field}")
                        self._check(row, field, path, key)
                        # Copy: a tensor mapped from the file would need the file as long as the tensor exists.
                        parts[field] = row.to(device, copy=True)
        except (OSError, SafetensorError) as error:
            raise _broken(path, str(error)) from error
        return Conditioning(**parts)

    def _check(self, row: Tensor, field: str, path: Path, key: str) -> None:
        """Fail if a row is damaged, or has another shape than the rows read before."""
        expected = self._checksums.get((path, f"{key}.{field}"))
        if expected is not None and checksum(row) != expected:
            raise _broken(path, f"the checksum of a row of {field!r} does not match")
        shape = self._shapes.setdefault(field, tuple(row.shape))
        if shape != tuple(row.shape):
            raise _broken(path, f"a row of {field!r} has shape {tuple(row.shape)}, others have {shape}")

    def write(self, rows: Mapping[str, Conditioning]) -> None:
        """Write the embeddings of some texts, one row each, as one shard: completely or not at all.

        Raises:
            UserError: If the disk is full or not writable; earlier shards stay intact.
        """
        from safetensors.torch import save

        named = {
            f"{key_of(text)}.{field}": getattr(row, field)
            for text, row in rows.items()
            for field in FIELDS
            if getattr(row, field) is not None
        }
        # Serialize to bytes and write them plainly: safetensors' save_file maps the file into memory, where a
        # full disk kills the process instead of raising an error. Clone: safetensors refuses rows that share
        # a batch's memory.
        rows_by_name = {
            n: part.detach().cpu().clone(memory_format=torch.contiguous_format) for n, part in named.items()
        }
        checksums = {name: checksum(row) for name, row in rows_by_name.items()}
        content = save(rows_by_name, {FINGERPRINT: self.fingerprint, **checksums})
        try:
            with atomic_file(self._unnamed, final=self._next_name) as part:
                part.write_bytes(content)
        except WriteError as error:
            raise self._unwritable(error.__cause__ or error, len(content)) from error
        self.refresh()

    def check_room(self, count: int, bytes_each: int) -> None:
        """Check that the disk has room for ``count`` more prompts of ``bytes_each`` bytes.

        Raises:
            UserError: If it has not.
        """
        free = shutil.disk_usage(self.directory).free
        if count * bytes_each > free:
            raise UserError(
                f"{count:,} prompts of {size(bytes_each)} each need {size(count * bytes_each)}; {size(free)} are free",
                where=str(self.directory),
                remedy="free some space, or set embedding_cache.directory to a directory on another disk",
            )

    @property
    def _unnamed(self) -> Path:
        """The shard that this rank is writing: its name is known when it is complete."""
        return self.directory / f"{self.rank:05d}"

    def _next_name(self) -> Path:
        """A name that begins with the time, so that names are in the order in which shards were completed."""
        return self.directory / f"{time.time_ns():020d}-{self.rank:05d}.safetensors"

    def _unwritable(self, error: BaseException, count: int | None = None) -> UserError:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        if isinstance(error, OSError) and error.errno == errno.EFBIG:
            reason = f"{reason} (a limit on the size of files)"
        return UserError(
            f"cannot write {'here' if count is None else size(count)}: {reason}",
            where=str(self.directory),
            remedy="earlier embeddings are complete and will be used; free some space, or use another directory",
        )


def key_of(text: str) -> str:
    """Key of a text in the shards: a hash, 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).hexdigest()


def checksum(row: Tensor) -> str:
    """Checksum of a tensor on the CPU: shape, dtype and every bit."""
    about = f"{tuple(row.shape)} {row.dtype}".encode()
    bits: Any = row.contiguous().view(-1).view(torch.uint8).numpy()
    return f"{zlib.crc32(bits, zlib.crc32(about)):08x}"


def size(count: int) -> str:
    """Format a number of bytes, as in ``2.7 MB``."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} TB"


def read_header(path: Path) -> dict[str, Any]:
    """Read the header of a safetensors file: dtype, shape and place of each tensor, and the metadata.

    Raises:
        UserError: If the file is incomplete.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            there = os.fstat(file.fileno()).st_size
            if 8 + length > there:
                raise ValueError(f"{there} bytes are less than its header")
            header = json.loads(file.read(length))
        needed = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        if there != needed:
            raise ValueError(f"it has {there} bytes instead of {needed}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise _broken(path, str(error)) from error
    return header


def _broken(path: Path, reason: str) -> UserError:
    return UserError(
        f"not an intact safetensors file ({reason})",
        where=str(path),
        remedy="remove this file; its prompts will be encoded again",
    )
