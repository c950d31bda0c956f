"""Under ZeRO-3 a backward pass gathers weights again, instead of keeping what the forward pass gathered.

A graph keeps views of weights, such as ``weight.t()`` of a linear layer, and with them what was gathered, although
DeepSpeed lets go of its own reference: after a forward pass with gradient a network would be whole on every rank.
DeepSpeed's ``memory_efficient_linear`` replaces ``torch.nn.functional.linear`` for the whole process; here views are
replaced, of any layer, and only those of networks in shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gdmd_lightning.strategies import partitions


@dataclass(frozen=True)
class _View:
    """A view of a weight, without its values.

    Args:
        weight: The weight.
        size, stride: Those of the view.
        offset: Elements from the beginning of the weight to that of the view.
    """

    weight: nn.Parameter
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class NoSavedWeights:
    """Graphs of a network's calls keep no views of its own weights.

    Args:
        network: A network in shards, with the hooks of its engine.
    """

    def __init__(self, network: nn.Module) -> None:
        self._running: list[nn.Module] = []  # the innermost last
        self._calls: list[saved_tensors_hooks] = []
        self._handles: list[Any] = []
        for module in network.modules():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        self._handles.append(network.register_forward_pre_hook(self._begin))
        self._handles.append(network.register_forward_hook(self._end, always_call=True))

    def remove(self) -> None:
        """Let graphs keep them again."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _leave(self, *_: Any) -> None:
        self._running.pop()

    def _begin(self, *_: Any) -> None:
        self._calls.append(saved_tensors_hooks(self._pack, _unpack))
        self._calls[-1].__enter__()

    def _end(self, *_: Any) -> None:
        self._calls.pop().__exit__()

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        storage = tensor.untyped_storage().data_ptr()
        for weight in self._running[-1].parameters(recurse=False):
            start = int(tensor.storage_offset()) - int(weight.data.storage_offset())
            if weight.data.untyped_storage().data_ptr() == storage and 0 <= start < weight.numel():
                return _View(weight, tensor.size(), tensor.stride(), start)
        return tensor


def _unpack(saved: Tensor | _View) -> Tensor:
    if isinstance(saved, Tensor):
        return saved
    with partitions.whole(saved.weight) as weight:
        return weight.as_strided(saved.size, saved.stride, weight.storage_offset() + saved.offset)
