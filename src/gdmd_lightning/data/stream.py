"""The endless order of prompts: a pure function of source and seed that can be entered at any place.

*Item* ``i`` is the ``i``-th prompt of the shuffled passes, one after another. Batch ``n`` of rank ``r`` of ``R`` holds
those items among ``n * k * R`` to ``(n + 1) * k * R - 1`` whose number is ``r`` modulo ``R``, with ``k`` prompts a
batch; worker ``w`` of ``W`` makes the batches ``start + w``, ``start + w + W``, ... So a position is one number, the
ranks share every pass without overlap or loss, and the number of workers changes nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from torch.utils.data import IterableDataset, get_worker_info

from gdmd_lightning.data.readers import PromptSource, no_prompt
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt, PromptBatch


def shuffled(source: PromptSource, *, seed: int, block: int, start: int = 0) -> Iterator[Prompt]:
    """The endless passes over a source from item ``start`` on, each block of rows in an order of its own.

    Args:
        source: Where the prompts come from.
        seed: With the numbers of pass and block, the seed of the block's order.
        block: How many rows are shuffled among each other and held in memory; 1 or less keeps the source's order.
        start: Number of the first item, over all passes.

    Raises:
        UserError: A row is not a prompt, or the source has none.
    """
    block = max(block, 1)
    # Until the length of a pass is known, `row` may lie beyond its end.
    number, row = 0, start
    while True:
        first = seen = row - row % block
        rows = source.read(first)
        while prompts := list(islice(rows, block)):
            if block > 1:
                random.Random(f"block {seed} {number} {seen // block}").shuffle(prompts)
            yield from prompts[max(row - seen, 0) :]
            seen += len(prompts)
        length = seen if seen > first else source.count()
        if length == 0:
            raise no_prompt(source)
        if row < length:
            number, row = number + 1, 0
        else:
            passes, row = divmod(row, length)
            number += passes


@dataclass(frozen=True)
class PromptStream(IterableDataset[PromptBatch | UserError]):
    """The batches of one rank, endlessly; an error in the source is the last thing that it yields.

    An error raised in a loader's worker would reach the user as a traceback inside a message, so it travels as a
    value and is raised where the batches arrive (``PromptLoader``).

    Args:
        source: Where the prompts come from.
        seed: Seed of the order.
        shuffle_buffer: Rows shuffled among each other.
        prompts: Prompts a batch.
        group_size: Samples a prompt.
        rank: This process among those that share the stream.
        world_size: How many processes share the stream.
        start: Number of the first batch.
    """

    source: PromptSource
    seed: int
    shuffle_buffer: int
    prompts: int
    group_size: int
    rank: int = 0
    world_size: int = 1
    start: int = 0

    def __iter__(self) -> Iterator[PromptBatch | UserError]:
        """The share of the loader's worker in which it is called."""
        worker = get_worker_info()
        first, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        try:
            yield from self._batches(self.start + first, stride)
        except UserError as error:
            yield error

    def _batches(self, start: int, stride: int) -> Iterator[PromptBatch]:
        per_update = self.prompts * self.world_size
        items = shuffled(self.source, seed=self.seed, block=self.shuffle_buffer, start=start * per_update)
        for n in count():
            if n % stride == 0:
                mine = list(islice(items, per_update))[self.rank :: self.world_size]
                yield PromptBatch(tuple(prompt for prompt in mine for _ in range(self.group_size)), self.group_size)
            else:
                next(islice(items, per_update, per_update), None)
