"""Named random streams: every draw is a function of a name, never of what was drawn before it.

A name is a path such as ``("picture", seed, row, number)``. Streams need no place in a checkpoint, and drawing more
numbers in one place (logging, evaluation) cannot change another.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

BLOCK = 64
"""Rows of a batch that share a stream, see :class:`BatchStream`."""


def named_seed(*name: object) -> int:
    """Seed that belongs to a name, for libraries that take nothing else; in [0, 2^63)."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*name: object) -> torch.Generator:
    """Random stream of a name, for tensors; on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(named_seed(*name))


def streams_of(noise: Tensor) -> list[torch.Generator]:
    """A stream for each row of noise ``[B, ...]``, which the row itself determines, whatever batch it is in."""
    rows = noise.detach().float().cpu().numpy()
    return [stream("noise", hashlib.blake2b(row.tobytes(), digest_size=8).hexdigest()) for row in rows]


def python_stream(*name: object) -> random.Random:
    """Random stream of a name, for choices and shuffles of Python objects."""
    return random.Random(" ".join(map(str, name)))


class BatchStream:
    """Random numbers for the rows of a batch, of which each rank has an equal part: the same on any number of ranks.

    The rows of all ranks are numbered in the order of ranks. Each :data:`BLOCK` of them has a stream of its own, so a
    rank draws no more than the blocks that its rows are in, and keeps its rows. All draws must be for the same number
    of rows; the streams go on from draw to draw.

    Args:
        of: Gives the stream of a place: of the number of a block, or of ``("row", number)``.
        rank: This rank.
        world_size: Number of ranks.
    """

    def __init__(self, of: Callable[..., torch.Generator], rank: int = 0, world_size: int = 1) -> None:
        self._of, self.rank, self.world_size = of, rank, world_size
        self._blocks: dict[int, torch.Generator] = {}
        self._missed: list[Callable[[torch.Generator], Tensor]] = []

    @property
    def common(self) -> torch.Generator:
        """A stream for draws that concern all rows alike: that of the first block, after the draws so far."""
        for draw in self._missed:
            draw(self._block(0))
        self._missed.clear()
        return self._block(0)

    def numbers(self, rows: int) -> range:
        """Numbers of this rank's ``rows`` in the batch of all ranks."""
        return range(self.rank * rows, (self.rank + 1) * rows)

    def each_row(self, rows: int) -> list[torch.Generator]:
        """A stream for each row, for draws whose length depends on the row."""
        return [self._of("row", number) for number in self.numbers(rows)]

    def draw(self, rows: int, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
        """``draw(n, rng)``, which must return ``n`` rows, for this rank's rows, ``[rows, ...]``."""
        mine, total = self.numbers(rows), rows * self.world_size
        parts = []
        if mine.start >= BLOCK:
            self._missed.append(partial(draw, min(BLOCK, total)))
        for block in range(mine.start // BLOCK, (mine.stop - 1) // BLOCK + 1):
            first, stop = block * BLOCK, min((block + 1) * BLOCK, total)
            drawn = draw(stop - first, self._block(block))
            parts.append(drawn[max(mine.start - first, 0) : mine.stop - first])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, number: int) -> torch.Generator:
        if number not in self._blocks:
            self._blocks[number] = self._of(number)
        return self._blocks[number]


Streams = torch.Generator | BatchStream | Sequence[torch.Generator]
"""Random streams for a batch: one, those of a batch that ranks share, or one per row, whose noise then does not depend
on the other rows."""


def draw_uniform(shape: tuple[int, ...], rng: torch.Generator | BatchStream) -> Tensor:
    """Numbers in [0, 1) of ``shape``, batch first, on the CPU."""
    if isinstance(rng, torch.Generator):
        return torch.rand(shape, generator=rng)
    return rng.draw(shape[0], lambda rows, stream: torch.rand(rows, *shape[1:], generator=stream))


def draw_noise(shape: tuple[int, ...], rng: Streams, device: torch.device) -> Tensor:
    """Standard normal noise of ``shape``, drawn on the CPU and moved to ``device``.

    Args:
        shape: Batch first.
        rng: One stream, that of a batch, or one for each of the ``shape[0]`` rows.
        device: Where the noise is needed.

    Raises:
        ValueError: If the number of streams is not the number of rows.
    """
    if isinstance(rng, torch.Generator):
        return torch.randn(shape, generator=rng).to(device)
    if isinstance(rng, BatchStream):
        drawn = rng.draw(shape[0], lambda rows, stream: torch.randn(rows, *shape[1:], generator=stream))
        return drawn.to(device)
    if len(rng) != shape[0]:
        raise ValueError(f"{len(rng)} streams for {shape[0]} rows of noise")
    return torch.stack([torch.randn(shape[1:], generator=row) for row in rng]).to(device)
