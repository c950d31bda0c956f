"""What travels through a method: latents, and what a network is conditioned on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Embedded prompts, a network's input next to latent and noise level.

    Args:
        sequence: Token embeddings, ``[B, L, D]``.
        pooled: One embedding per prompt, ``[B, P]``, where the family has one.
        ids: Further tensors that a family needs (SDXL's time ids, FLUX.2's text positions), ``[B, ...]``.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequence)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        parts = (self.sequence, self.pooled, self.ids)
        return Conditioning(*(None if t is None else function(t) for t in parts))  # type: ignore[arg-type]

    def repeat(self, times: int) -> Conditioning:
        """Repeat each row ``times`` times, copies of a row next to each other, ``[B * times, ...]``."""
        return self._map(lambda t: t.repeat_interleave(times, dim=0))

    def select(self, rows: Tensor) -> Conditioning:
        """Select rows by index, in the given order."""
        return self._map(lambda t: t[rows])

    def slice(self, start: int, stop: int) -> Conditioning:
        """Rows ``start`` to ``stop - 1``, as a view."""
        return self._map(lambda t: t[start:stop])

    def expand(self, batch: int) -> Conditioning:
        """Expand a single row (``B = 1``) to ``batch`` rows, as a view."""
        return self._map(lambda t: t.expand(batch, *t.shape[1:]))

    def to(self, device: torch.device) -> Conditioning:
        """Move all tensors to a device."""
        return self._map(lambda t: t.to(device))

    def cast(self, dtype: torch.dtype) -> Conditioning:
        """Convert the embeddings to a dtype; ``ids`` keep theirs."""
        return Conditioning(self.sequence.to(dtype), None if self.pooled is None else self.pooled.to(dtype), self.ids)

    @staticmethod
    def concat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch; all parts must have the same optional tensors."""

        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            return torch.cat(present) if present else None

        return Conditioning(
            torch.cat([part.sequence for part in parts]),
            joined([part.pooled for part in parts]),
            joined([part.ids for part in parts]),
        )
