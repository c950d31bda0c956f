"""Named random streams: every draw is a function of a name, never of what was drawn before it.

A name is a path such as ``("picture", seed, row, number)``. Streams need no place in a checkpoint, and drawing more
numbers in one place (logging, evaluation) cannot change another.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import torch
from torch import Tensor

Streams = torch.Generator | Sequence[torch.Generator]
"""One random stream for a batch, or one per row, whose noise then does not depend on the other rows."""


def named_seed(*name: object) -> int:
    """Seed that belongs to a name, for libraries that take nothing else; in [0, 2^63)."""
    digest = hashlib.blake2b("/".join(map(str, name)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def stream(*name: object) -> torch.Generator:
    """Random stream of a name, for tensors; on the CPU, so that every device gets the same numbers."""
    return torch.Generator().manual_seed(named_seed(*name))


def python_stream(*name: object) -> random.Random:
    """Random stream of a name, for choices and shuffles of Python objects."""
    return random.Random(" ".join(map(str, name)))


def draw_noise(shape: tuple[int, ...], rng: Streams, device: torch.device) -> Tensor:
    """Standard normal noise of ``shape``, drawn on the CPU and moved to ``device``.

    Args:
        shape: Batch first.
        rng: One stream, or one for each of the ``shape[0]`` rows.
        device: Where the noise is needed.

    Raises:
        ValueError: If the number of streams is not the number of rows.
    """
    if isinstance(rng, torch.Generator):
        return torch.randn(shape, generator=rng).to(device)
    if len(rng) != shape[0]:
        raise ValueError(f"{len(rng)} streams for {shape[0]} rows of noise")
    return torch.stack([torch.randn(shape[1:], generator=row) for row in rng]).to(device)
