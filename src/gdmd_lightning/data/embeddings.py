"""Embeddings of prompts, each computed once."""

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
"""Seconds to wait for files of other machines: NFS caches directory listings for up to 60 s by default."""


class PromptEmbeddings:
    """Least-recently-used cache of prompt embeddings in CPU memory.

    CPU memory has room for thousands of T5 embeddings (2.7 MB each), and moving a batch to a GPU takes a
    millisecond or two.

    Prompts are encoded one by one. The last bits of a matrix product depend on its number of rows, and a
    resumed run, whose cache differs from that of the original run, must get the same embeddings. Embeddings
    in a store were encoded in batches, but only once, so every later run reads the same bits.

    Args:
        family: The family that encodes the prompts.
        capacity: Number of prompts to cache.
        store: Embeddings on disk, looked up before encoding.
    """

    def __init__(self, family: ModelFamily, capacity: int = 4096, store: EmbeddingStore | None = None) -> None:
        self.family, self.capacity, self.store = family, capacity, store
        self._known: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """One row per text, ``[B, ...]``, on the family's device.

        Raises:
            UserError: If a text is not in the store and the text encoders have been freed.
        """
        chosen = []
        for text in texts:
            if text not in self._known:
                self._known[text] = self._embed(text).to(torch.device("cpu"))
            self._known.move_to_end(text)
            chosen.append(self._known[text])
            if len(self._known) > self.capacity:
                self._known.popitem(last=False)
        return Conditioning.concat(chosen).to(self.family.empty.sequence.device)

    def _embed(self, text: str) -> Conditioning:
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
    """Encode the texts missing from a store, divided among the ranks; afterwards every store has all.

    Each rank encodes the texts whose hash equals its rank modulo ``world_size``. This does not depend on
    which shards a rank has already seen, which differs between ranks that start at different times.

    Args:
        store: This rank's view of the directory.
        family: The family that encodes the texts.
        texts: The same texts on all ranks.
        batch_size: Texts encoded at once.
        shard_size: Texts per file.
        rank: Rank of this process.
        world_size: Number of processes.
        barrier: Blocks until all processes have called it.

    Returns:
        Number of texts that this rank encoded.

    Raises:
        UserError: If the disk has no room, or the ranks do not share the directory.
    """
    from tqdm import tqdm

    distinct = list(dict.fromkeys(texts))
    absent = store.missing(distinct)
    store.check_room(len(absent), bytes_each(family))
    mine = [text for text in absent if int(key_of(text), 16) % world_size == rank]
    with tqdm(total=len(mine), desc="text embeddings", unit="prompt", disable=bool(rank) or not mine) as bar:
        for shard in _chunks(mine, shard_size):
            rows: dict[str, Conditioning] = {}
            for batch in _chunks(shard, batch_size):
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
    _wait_for(store, distinct, PATIENCE if world_size > 1 else 0)
    return len(mine)


def _wait_for(store: EmbeddingStore, texts: Sequence[str], seconds: float) -> None:
    """Refresh the store until it has all texts; raise an error after some seconds."""
    last = time.monotonic() + seconds
    while True:
        store.refresh()
        absent = store.missing(texts)
        if not absent:
            return
        if time.monotonic() > last:
            raise UserError(
                f"lacks {len(absent)} of {len(texts)} prompts that other processes embedded, e.g. {absent[0][:60]!r}",
                where=str(store.directory),
                remedy="set embedding_cache.directory to a directory that all processes share",
            )
        time.sleep(1)


def bytes_each(family: ModelFamily) -> int:
    """Size of one prompt's embedding in bytes."""
    parts = (family.empty.sequence, family.empty.pooled, family.empty.ids)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


@runtime_checkable
class HasPrompts(Protocol):
    """A callback that generates images of prompts which may not be training prompts."""

    prompts: Sequence[Prompt]


def prompts_of_run(data: PromptDataModule, callbacks: Iterable[object], most: int, each: int) -> list[str]:
    """All distinct texts that a run will embed, including the empty one, in order of first use.

    Streams the source once and holds only the distinct texts in memory.

    Args:
        data: The training prompts.
        callbacks: The trainer's callbacks; their prompts are included.
        most: Maximum number of distinct texts.
        each: Bytes per embedding, for the error message.

    Raises:
        UserError: If there are more than ``most`` texts, or the source is broken anywhere.
    """
    seen: dict[str, None] = {"": None}
    for text in _texts(data, callbacks):
        seen[text] = None
        if len(seen) > most:
            raise UserError(
                f"the run has more than {most:,} distinct prompts; each takes {each:,} bytes on disk, "
                f"{most:,} take {size(most * each)}",
                where="embedding_cache.most",
                remedy="raise it if the disk has room, use fewer prompts, or remove embedding_cache to encode "
                "prompts during training",
            )
    return list(seen)


def _texts(data: PromptDataModule, callbacks: Iterable[object]) -> Iterator[str]:
    for callback in callbacks:
        if isinstance(callback, HasPrompts):
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
    """Embed all prompts of a run, and free the text encoders if the settings say so.

    Args:
        family: The loaded family.
        cache: Settings.
        data: The training prompts.
        callbacks: The trainer's callbacks, whose prompts are embedded too.
        rank: Rank of this process.
        world_size: Number of processes.
        barrier: Blocks until all processes have called it.

    Returns:
        Embeddings that are read from the directory.

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


def _chunks(texts: Sequence[str], length: int) -> Iterator[Sequence[str]]:
    for start in range(0, len(texts), length):
        yield texts[start : start + length]
