"""What travels together through an update: conditionings, noisy latents with their levels, and batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd_lightning.prompts import Prompt
from gdmd_lightning.schedules import x0_from_velocity


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings and whatever else a network takes besides the noisy latents.

    Args:
        sequence: Token embeddings, ``[B, L, D]``.
        pooled: One embedding per prompt, ``[B, P]``, if the family has one.
        ids: Other tensors specific to the family (FLUX.2's text positions), ``[B, ...]``.
    """

    sequence: Tensor
    pooled: Tensor | None = None
    ids: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sequence)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Conditioning:
        pooled = None if self.pooled is None else function(self.pooled)
        return Conditioning(function(self.sequence), pooled, None if self.ids is None else function(self.ids))

    def repeat(self, times: int) -> Conditioning:
        """Repeat each row ``times`` times in a row, ``[B * times, ...]``."""
        return self._map(lambda t: t.repeat_interleave(times, dim=0))

    def select(self, rows: Tensor | slice) -> Conditioning:
        """The given rows, in the given order."""
        return self._map(lambda t: t[rows])

    def expand(self, batch: int) -> Conditioning:
        """One row (``B = 1``) viewed as ``batch`` rows."""
        return self._map(lambda t: t.expand(batch, *t.shape[1:]))

    def to(self, device: torch.device) -> Conditioning:
        """Move all tensors to ``device``."""
        return self._map(lambda t: t.to(device))

    def cast(self, dtype: torch.dtype) -> Conditioning:
        """Cast the embeddings; ``ids`` keep their dtype."""
        return Conditioning(self.sequence.to(dtype), None if self.pooled is None else self.pooled.to(dtype), self.ids)

    @staticmethod
    def concat(parts: Sequence[Conditioning]) -> Conditioning:
        """Concatenate along the batch; all parts must hold the same tensors."""

        def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
            present = [t for t in tensors if t is not None]
            return torch.cat(present) if present else None

        return Conditioning(
            torch.cat([part.sequence for part in parts]),
            joined([part.pooled for part in parts]),
            joined([part.ids for part in parts]),
        )


@dataclass(frozen=True)
class NoisyLatents:
    """Latents with their noise levels and prompts: what a role is evaluated on.

    Args:
        x: ``x_sigma``, ``[B, C, H, W]``.
        sigma: ``[B]``, in [0, 1].
        conditioning: ``B`` rows.
    """

    x: Tensor
    sigma: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.x)

    def repeat(self, times: int) -> NoisyLatents:
        """Repeat each row ``times`` times in a row, ``B * times`` rows."""
        x, sigma = self.x.repeat_interleave(times, dim=0), self.sigma.repeat_interleave(times)
        return NoisyLatents(x, sigma, self.conditioning.repeat(times))

    def select(self, rows: Tensor | slice) -> NoisyLatents:
        """The given rows, in the given order."""
        return NoisyLatents(self.x[rows], self.sigma[rows], self.conditioning.select(rows))

    def x0(self, velocity: Tensor) -> Tensor:
        """Clean latents that a velocity ``[B, C, H, W]`` implies, ``x_sigma - sigma * velocity``."""
        return x0_from_velocity(self.x, velocity, self.sigma)


@dataclass(frozen=True)
class Batch:
    """What a method sees of one update on one rank: ``B`` samples with their prompts.

    Args:
        prompts: One per sample.
        groups: Index of each sample's prompt, ``[B]`` from 0 without gaps, on the CPU.
        conditioning: ``B`` rows, on the device.
        real_x0: Latents of real images of the prompts, ``[B, C, H, W]``, for methods that need them.
    """

    prompts: tuple[Prompt, ...]
    groups: Tensor
    conditioning: Conditioning
    real_x0: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)


def micro_batches(rows: int, size: int | None) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` rows that cover ``rows``; a single one if ``size`` is ``None``."""
    step = rows if size is None else size
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def in_micro_batches(call: Callable[[slice], Tensor], rows: int, size: int | None) -> Tensor:
    """``call(slice)`` for all micro-batches of a batch, concatenated.

    On the meta device all micro-batches of one length are alike, so only the first of them is evaluated: a plan of
    many micro-batches takes no longer than one of two.
    """
    parts: list[Tensor] = []
    for part in micro_batches(rows, size):
        alike = bool(parts) and parts[-1].is_meta and len(parts[-1]) == part.stop - part.start
        parts.append(torch.empty_like(parts[-1]) if alike else call(part))
    return parts[0] if len(parts) == 1 else torch.cat(parts)
