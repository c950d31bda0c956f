"""Embeddings of prompts, computed once a prompt and in batches."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from gdmd_lightning.families.base import Conditioning, ModelFamily


class PromptEmbeddings:
    """Encodes the prompts it has not seen and remembers the most recent ones.

    Args:
        family: Whose text encoders are used.
        capacity: How many prompts are remembered.
    """

    def __init__(self, family: ModelFamily, capacity: int = 4096) -> None:
        self.family, self.capacity = family, capacity
        self._known: OrderedDict[str, Conditioning] = OrderedDict()
        self.encoded = 0

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """One row for each text, ``[B, ...]``."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        if new:
            rows = self.family.encode(new)
            self.encoded += len(new)
            for i, text in enumerate(new):
                self._known[text] = rows.slice(i, i + 1)
        chosen = []
        for text in texts:
            self._known.move_to_end(text)
            chosen.append(self._known[text])
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        return Conditioning.concat(chosen)
