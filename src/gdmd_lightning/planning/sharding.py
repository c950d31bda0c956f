"""What one GPU holds of a network that a strategy splits over several, in bytes: arithmetic without networks.

ZeRO is DeepSpeed's (0.19), with weights in float32; FSDP2 is ``torch.distributed.fsdp.fully_shard``, which splits each
parameter along its first dimension. Moments are Adam's two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["whole", "zero1", "zero2", "zero3", "fsdp2"]
FLOAT32 = 4


@dataclass(frozen=True)
class Shape:
    """A parameter.

    Args:
        first: Its first dimension, 1 for a scalar.
        numel: How many numbers it has.
        itemsize: Bytes per number.
    """

    first: int
    numel: int
    itemsize: int


@dataclass(frozen=True)
class Split:
    """How a network is split.

    Args:
        kind: ZeRO stage, FSDP2, or not at all.
        ranks: Over how many GPUs, at least 1.
        stays_whole: With ZeRO-3, a parameter with at most this many numbers stays whole after its first use, in
            addition to its shard.
        bucket: Numbers in DeepSpeed's bucket of gradients.
        prefetch: Numbers that ZeRO-3 gathers ahead.
        offload_optimizer: Whether ZeRO's optimizer is in the memory of the host.
        offload_weights: Whether ZeRO-3's shards of weights are in the memory of the host.
    """

    kind: Kind = "whole"
    ranks: int = 1
    stays_whole: int = 0
    bucket: int = 0
    prefetch: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False

    @property
    def weights_in_shards(self) -> bool:
        """Whether no GPU holds all weights."""
        return self.kind in ("zero3", "fsdp2")

    @property
    def drops_gradients(self) -> bool:
        """Whether a gradient is reduced to its shard as soon as it is known, instead of staying whole."""
        return self.kind in ("zero2", "zero3", "fsdp2")

    def shard(self, shapes: Sequence[Shape]) -> int:
        """Numbers in the largest shard of these parameters, padding included."""
        if self.kind == "whole":
            return sum(shape.numel for shape in shapes)
        if self.kind == "fsdp2":
            return sum(math.ceil(s.first / self.ranks) * (s.numel // max(s.first, 1)) for s in shapes)
        if self.kind == "zero3":
            return sum(math.ceil(shape.numel / self.ranks) for shape in shapes)
        # One flat tensor, whose length is a multiple of twice the number of ranks.
        return math.ceil(sum(shape.numel for shape in shapes) / (2 * self.ranks)) * 2

    def weights(self, shapes: Sequence[Shape]) -> int:
        """Bytes of weights, those in use excepted."""
        if self.kind in ("zero1", "zero2"):
            return self.shard(shapes) * self.ranks * _itemsize(shapes)
        small = sum(s.numel * s.itemsize for s in shapes if s.numel <= self.stays_whole and self.kind == "zero3")
        if self.kind == "whole":
            return sum(s.numel * s.itemsize for s in shapes)
        return (0 if self.offload_weights else self.shard(shapes) * _itemsize(shapes)) + small

    def master(self, shapes: Sequence[Shape]) -> int:
        """Bytes of the weights that the optimizer steps: DeepSpeed copies the shards, also those in float32."""
        copied = self.kind.startswith("zero") and not self.offload_optimizer
        return self.shard(shapes) * FLOAT32 if copied else 0

    def gradients(self, shapes: Sequence[Shape]) -> int:
        """Bytes of gradients in shards; those of FSDP2 are freed before the next backward pass."""
        return 0 if self.offload_optimizer or not self.weights_in_shards else self.shard(shapes) * FLOAT32

    def reduced(self, shapes: Sequence[Shape]) -> int:
        """Bytes of ZeRO-2's gradients in shards, from a backward pass to the step; ZeRO-1 has whole ones then."""
        return 0 if self.offload_optimizer or self.kind != "zero2" else self.shard(shapes) * FLOAT32

    def moments(self, shapes: Sequence[Shape]) -> int:
        """Bytes of Adam's moments."""
        return 0 if self.offload_optimizer else 2 * self.shard(shapes) * FLOAT32

    def buckets(self) -> int:
        """Bytes of the bucket in which gradients are averaged; ZeRO-1 and 2 free it after a backward pass."""
        return self.bucket * FLOAT32 if self.kind.startswith("zero") else 0

    def stepping(self, shapes: Sequence[Shape]) -> int:
        """Bytes in addition during a step: the flat gradient of ZeRO, as large as the weights that are stepped."""
        return self.master(shapes)

    def gathered(self, network: nn.Module, *, learned: bool) -> int:
        """Most bytes of a network that are whole for the moment, its own shards not counted.

        ZeRO-3 gathers the parameters of one module and prefetches, into one tensor, and then copies each parameter out
        of it. FSDP2 gathers what is in no block at all, a block and the next, and has the gradients of a block before
        they are reduced.

        Args:
            network: The network, whole.
            learned: Whether in its backward pass.
        """
        if not self.weights_in_shards:
            return 0
        everything = sum(p.numel() * p.element_size() for p in network.parameters())
        if self.kind == "zero3":
            modules = [
                sum(p.numel() * p.element_size() for p in m.parameters(recurse=False)) for m in network.modules()
            ]
            return 2 * min(everything, max(modules) + self.prefetch * next(network.parameters()).element_size())
        blocks = [sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks_of(network)]
        if not blocks:
            return everything * (2 if learned else 1)
        return everything - sum(blocks) + max(blocks) * (3 if learned else 2)

    def on_host(self, shapes: Sequence[Shape]) -> int:
        """Bytes of one GPU's share in the memory of the host."""
        shard = self.shard(shapes)
        held = shard * _itemsize(shapes) if self.offload_weights else 0
        if not self.offload_optimizer:
            return held
        # The weights that are stepped, two moments, the gradients and their accumulation, and with ZeRO-1 and 2 a
        # buffer for the stepped weights.
        return held + shard * FLOAT32 * (5 if self.kind == "zero3" else 6)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The members of a network's outermost lists of modules."""
    found: list[nn.Module] = []
    for child in network.children():
        if isinstance(child, nn.ModuleList):
            found += [member for member in child if member is not None]
        else:
            found += blocks_of(child)
    return found


def shapes_of(parameters: Iterable[nn.Parameter]) -> list[Shape]:
    """What the arithmetic needs to know of parameters."""
    return [Shape(len(p) if p.dim() else 1, p.numel(), p.element_size()) for p in parameters]


def _itemsize(shapes: Sequence[Shape]) -> int:
    return shapes[0].itemsize if shapes else 0
