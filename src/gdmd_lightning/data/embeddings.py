"""Embeddings of prompts, computed once a prompt."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch

from gdmd_lightning.data.embedding_cache import EmbeddingCache, EmbeddingStore, key_of, size
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.prompts import Prompt

if TYPE_CHECKING:
    from gdmd_lightning.data.prompt_data import PromptDataModule

PATIENCE = 60
"""Seconds in which other machines' files must appear; NFS keeps a directory's listing for up to 60 by default."""


class PromptEmbeddings:
    """Encodes the prompts it has not seen and remembers the most recent ones.

    They wait in the CPU's memory, where thousands of T5's (2.7 MB each) do no harm; a batch of them is on its way to a
    GPU for a millisecond or two. Each is encoded by itself: the last bits of a matrix product depend on how many rows
    are in it, and a resumed run, which remembers other prompts than the run it continues, must get the same
    embeddings. Those of a store were encoded in batches, once; what was written is what every later run reads.

    Args:
        family: Whose text encoders are used.
        capacity: How many prompts are remembered.
        store: Where embeddings are looked for before they are computed.
    """

    def __init__(self, family: ModelFamily, capacity: int = 4096, store: EmbeddingStore | None = None) -> None:
        self.family, self.capacity, self.store = family, capacity, store
        self._known: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """One row for each text, ``[B, ...]``.

        Raises:
            UserError: If a text is not in the store and the text encoders are freed.
        """
        chosen = []
        for text in texts:
            if text not in self._known:
                self._known[text] = self._found(text).to(torch.device("cpu"))
            self._known.move_to_end(text)
            chosen.append(self._known[text])
            if len(self._known) > self.capacity:
                self._known.popitem(last=False)
        return Conditioning.concat(chosen).to(self.family.empty.sequence.device)

    def _found(self, text: str) -> Conditioning:
        if self.store is not None and text in self.store:
            return self.store.read(text, torch.device("cpu"))
        return self.family.encode([text])


def fill(
    store: EmbeddingStore,
    family: ModelFamily,
    texts: Iterable[str],
    *,
    batch_size: int,
    shard_size: int,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] = lambda: None,
) -> int:
    """Encode the texts that a store lacks, shared among the ranks; afterwards every rank's store has them all.

    A rank's share are the texts whose hash is its number modulo ``world_size``: what has been written meanwhile, which
    ranks see at different times, then changes nothing about who encodes what.

    Args:
        store: Of this rank.
        family: Whose text encoders are used.
        texts: The same on all ranks.
        batch_size: Texts encoded at once.
        shard_size: Texts a file.
        rank, world_size: This process among those that share the work.
        barrier: Returns when all of them have called it.

    Returns:
        How many texts this rank encoded.

    Raises:
        UserError: If the disk has no room, or the directory is not one that all ranks see.
    """
    from tqdm import tqdm

    distinct = list(dict.fromkeys(texts))
    absent = store.missing(distinct)
    store.check_room(len(absent), bytes_each(family))
    mine = [text for text in absent if int(key_of(text), 16) % world_size == rank]
    with tqdm(total=len(mine), desc="text embeddings", unit="prompt", disable=bool(rank) or not mine) as bar:
        for shard in _portions(mine, shard_size):
            rows: dict[str, Conditioning] = {}
            for batch in _portions(shard, batch_size):
                encoded = family.encode(batch)
                if encoded.sequence.shape[1:] != family.empty.sequence.shape[1:]:
                    raise UserError(
                        f"embeddings of {batch[0][:60]!r} and of the empty prompt differ in shape",
                        where=f"{type(family).__name__}.encode",
                        remedy="pad all prompts to one length",
                    )
                rows |= {text: encoded.select(slice(i, i + 1)) for i, text in enumerate(batch)}
                bar.update(len(batch))
            store.write(rows)
    barrier()
    _await(store, distinct, PATIENCE if world_size > 1 else 0)
    return len(mine)


def _await(store: EmbeddingStore, texts: Sequence[str], seconds: float) -> None:
    last = time.monotonic() + seconds
    while True:
        store.refresh()
        absent = store.missing(texts)
        if not absent:
            return
        if time.monotonic() > last:
            raise UserError(
                f"lacks {len(absent)} of {len(texts)} prompts that other processes embedded, as {absent[0][:60]!r}",
                where=str(store.directory),
                remedy="give embedding_cache.directory a directory that all processes share",
            )
        time.sleep(1)


def bytes_each(family: ModelFamily) -> int:
    """Bytes of a prompt's embedding."""
    parts = (family.empty.sequence, family.empty.pooled, family.empty.ids)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


@runtime_checkable
class DrawsPrompts(Protocol):
    """A callback that has pictures of its own prompts drawn."""

    prompts: Sequence[Prompt]


def prompts_of_run(data: PromptDataModule, callbacks: Iterable[object], most: int, each: int) -> list[str]:
    """All distinct texts that a run will ask for, the empty one among them, in the order in which they first stand.

    The source is streamed once; only the distinct texts are held.

    Args:
        data: The training prompts.
        callbacks: The trainer's; those that have prompts of their own are asked for them.
        most: How many there may be.
        each: Bytes of an embedding, for the message.

    Raises:
        UserError: If there are more than ``most``, or the source is broken at any place.
    """
    seen: dict[str, None] = {"": None}
    for text in _texts(data, callbacks):
        seen[text] = None
        if len(seen) > most:
            raise UserError(
                f"the run asks for more than {most:,} distinct prompts; each takes {each:,} bytes on disk, "
                f"{most:,} take {size(most * each)}",
                where="embedding_cache.most",
                remedy="raise it if the disk has room, choose fewer prompts, or leave embedding_cache out, "
                "which encodes prompts as they come",
            )
    return list(seen)


def _texts(data: PromptDataModule, callbacks: Iterable[object]) -> Iterator[str]:
    for callback in callbacks:
        if isinstance(callback, DrawsPrompts):
            yield from (prompt.text for prompt in callback.prompts)
    yield from data.texts()


def embed_ahead(
    family: ModelFamily,
    cache: EmbeddingCache,
    data: PromptDataModule,
    callbacks: Iterable[object],
    *,
    rank: int,
    world_size: int,
    barrier: Callable[[], object],
) -> PromptEmbeddings:
    """Embed all that a run will ask for, free the text encoders if told so, and give back what answers from the store.

    Raises:
        UserError: As :class:`EmbeddingStore`, :func:`prompts_of_run` and :func:`fill`.
    """
    store = EmbeddingStore(cache.directory, family.text_fingerprint(), rank)
    texts = prompts_of_run(data, callbacks, cache.most, bytes_each(family))
    fill(
        store,
        family,
        texts,
        batch_size=cache.batch_size,
        shard_size=cache.shard_size,
        rank=rank,
        world_size=world_size,
        barrier=barrier,
    )
    if cache.free_encoders:
        family.free_text_encoders()
    return PromptEmbeddings(family, store=store)


def _portions(texts: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), length):
        yield texts[start : start + length]
