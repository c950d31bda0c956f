"""Embeddings of prompts, computed once a prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from gdmd_lightning.families.base import Conditioning, ModelFamily


class PromptEmbeddings:
    """Encodes the prompts it has not seen and remembers the most recent ones.

    Each is encoded by itself: the last bits of a matrix product depend on how many rows are in it, and a resumed run,
    which remembers other prompts than the run it continues, must get the same embeddings.

    Args:
        family: Whose text encoders are used.
        capacity: How many prompts are remembered.
    """

    def __init__(self, family: ModelFamily, capacity: int = 4096) -> None:
        self.family, self.capacity = family, capacity
        self._known: OrderedDict[str, Conditioning] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """One row for each text, ``[B, ...]``."""
        chosen = []
        for text in texts:
            if text not in self._known:
                self._known[text] = self.family.encode([text])
            self._known.move_to_end(text)
            chosen.append(self._known[text])
            if len(self._known) > self.capacity:
                self._known.popitem(last=False)
        return Conditioning.concat(chosen)
