"""Rows of a batch that ranks share, for what must see the whole batch: its spread, its groups, its mean.

Ranks have equally many rows, in the order of ranks. Without a process group there is one rank. All ranks must call
these functions in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed


def place() -> tuple[int, int]:
    """This rank, and the number of ranks."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(rows: Tensor) -> Tensor:
    """The rows of all ranks, ``[R * B, ...]``, without gradient; ``rows`` are this rank's, ``[B, ...]``."""
    _, ranks = place()
    if ranks == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(ranks)]
    distributed.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def own_part(rows: Tensor) -> Tensor:
    """This rank's rows ``[B, ...]`` of those of all ranks, ``[R * B, ...]``."""
    rank, ranks = place()
    return rows.chunk(ranks)[rank]


def all_groups(groups: Tensor) -> Tensor:
    """Indices of groups in the batch of all ranks, ``[R * B]``.

    Args:
        groups: This rank's, ``[B]`` from 0 without gaps, in rising order, on the CPU. They are the same on all ranks.
    """
    _, ranks = place()
    return torch.cat([groups + rank * (int(groups[-1]) + 1) for rank in range(ranks)])


def std(values: Tensor) -> Tensor:
    """Standard deviation of all elements on all ranks, a scalar without gradient."""
    _, ranks = place()
    if ranks == 1:
        return values.detach().std()
    wide = values.detach().double()
    sums = torch.stack([wide.sum(), wide.square().sum()])
    distributed.all_reduce(sums)
    count = ranks * values.numel()
    variance = (sums[1] - sums[0].square() / count) / (count - 1)
    return variance.clamp(min=0).sqrt().to(values.dtype)


def mean_over_ranks(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The mean of each scalar over the ranks, which must have the same names, in one exchange."""
    _, ranks = place()
    if ranks == 1 or not values:
        return values
    together = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
    distributed.all_reduce(together)
    return dict(zip(values, (together / ranks).unbind(), strict=True))
