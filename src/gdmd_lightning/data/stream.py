"""The endless order of prompts: a pure function of source and seed that can start at any position.

*Item* ``i`` is the ``i``-th prompt of all shuffled passes in sequence. With ``k`` prompts per batch on each of ``R``
ranks, batch ``n`` of rank ``r`` contains the ``k`` items from ``(n * R + r) * k`` on. Worker ``w`` of ``W`` makes the
batches ``start + w``, ``start + w + W``, ... So a position is a single number, the ranks together see what one process
with a batch ``R`` times as large would see, in that order, and the number of workers does not affect it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice

from torch.utils.data import IterableDataset, get_worker_info

from gdmd_lightning.data.readers import PromptSource, no_prompt
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.streams import python_stream


def shuffled(source: PromptSource, *, seed: int, block: int, start: int = 0) -> Iterator[Prompt]:
    """Endless passes over a source from item ``start``, with the rows of each block shuffled.

    Args:
        source: Source of the prompts.
        seed: Seed of the order; each block of each pass is shuffled differently.
        block: Number of rows that are held in memory and shuffled; 1 or less keeps the source's order.
        start: Number of the first item, counted over all passes.

    Raises:
        UserError: If a row is not a prompt, or the source has none.
    """
    block = max(block, 1)
    # `row` may be beyond the end of the pass until the length of a pass is known.
    number, row = 0, start
    while True:
        first = seen = row - row % block
        rows = source.read(first)
        while prompts := list(islice(rows, block)):
            if block > 1:
                python_stream("block", seed, number, seen // block).shuffle(prompts)
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
    """The endless batches of one rank. If the source is broken, the last item is the error.

    An error raised in a loader's worker would reach the user as a traceback inside a message. So it is
    yielded as a value, and raised where the batches arrive (``PromptLoader``).

    Args:
        source: Source of the prompts.
        seed: Seed of the order.
        shuffle_buffer: Number of rows that are shuffled together.
        prompts: Prompts per batch.
        group_size: Samples per prompt.
        rank: Rank of this process.
        world_size: Number of processes that share the stream.
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
        """The batches of the loader's worker in which this runs; all batches outside of a worker."""
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
                mine = list(islice(items, per_update))[self.rank * self.prompts : (self.rank + 1) * self.prompts]
                yield PromptBatch(tuple(prompt for prompt in mine for _ in range(self.group_size)), self.group_size)
            else:
                next(islice(items, per_update, per_update), None)
