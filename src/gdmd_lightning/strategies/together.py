"""What all ranks do together: fail if one fails, and write a sharded checkpoint."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import distributed

from gdmd_lightning.strategies import shards

T = TypeVar("T")


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Fail on all ranks if the file or the content that one rank reads or writes is at fault; all must enter.

    Args:
        what: What cannot be done then.

    Raises:
        MisconfigurationException: With the first rank's reason.
    """
    mine: str | None = None
    try:
        yield
    except (OSError, ValueError) as error:
        mine = f"rank {distributed.get_rank()}: {' '.join(str(error).split())}"
    failed = [each for each in of_all_ranks(mine) if each is not None]
    if failed:
        raise MisconfigurationException(f"{what}: {failed[0]}")


def of_all_ranks(mine: T) -> list[T]:
    """What all ranks have, in their order."""
    every = [mine] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    return every


def write_together(path: Path, rest: Mapping[str, Any], pieces: Mapping[str, Sequence[shards.Piece]]) -> None:
    """Write a sharded checkpoint, all ranks together; it gets its name when all have finished.

    Args:
        path: The checkpoint's directory.
        rest: What is not in shards; that of rank 0 is written.
        pieces: What this rank holds, by network.

    Raises:
        MisconfigurationException: If a rank could not write; what has the name is unchanged.
    """
    rank = distributed.get_rank()
    # One name for all, that of the process which could be asked whether it still runs.
    names = of_all_ranks(f"{path.name}.{os.getpid()}@{platform.node() or 'localhost'}.part")
    part = path.with_name(names[0])
    what = f"{str(path)!r} cannot be written"
    with failing_together(what):
        if rank == 0:
            shards.remove_parts(path)
            part.mkdir(parents=True)
    checksums: dict[str, int] = {}
    with failing_together(what):
        for network, own in pieces.items():
            checksums |= shards.write_pieces(part / network, rank, own)
    for each in of_all_ranks(checksums):
        checksums |= each
    with failing_together(what):
        if rank == 0:
            shards.write_rest(part, rest, pieces, distributed.get_world_size(), checksums)
            shards.publish(part, path)
