"""Where a rank reads its part of weights and moments from: a checkpoint in shards, or one that one process wrote."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from gdmd_lightning.strategies import shards


class Source(Protocol):
    """Weights and moments by the name of their parameter."""

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """Elements ``start`` to ``start + numel`` of the flat weight or moment ``key``."""
        ...

    def keys(self, name: str) -> set[str]:
        """What there is of the parameter's shape."""
        ...

    def scalars(self, name: str) -> dict[str, float]:
        """What else the optimizer keeps of it."""
        ...


def source_of(checkpoint: Mapping[str, Any], groups: Mapping[str, list[list[str]]]) -> Source:
    """The source that a loaded checkpoint is or, under ``sharded``, names.

    Args:
        checkpoint: The checkpoint.
        groups: Names of the parameters in each group of each optimizer.
    """
    if "sharded" in checkpoint:
        return shards.ShardedCheckpoint(checkpoint["sharded"])
    return _Plain(checkpoint, groups)


class _Plain:
    """A checkpoint that one process wrote; arguments as above."""

    def __init__(self, checkpoint: Mapping[str, Any], groups: Mapping[str, list[list[str]]]) -> None:
        self.weights = checkpoint["state_dict"]
        self.states: dict[str, Mapping[str, Any]] = {}
        for state, names in zip(checkpoint.get("optimizer_states", []), groups.values(), strict=False):
            flat = [name for group in names for name in group]
            self.states |= {flat[number]: own for number, own in state["state"].items()}

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        if key == shards.WEIGHT and name not in self.weights:
            raise ValueError(f"it has no {name}")
        whole = self.weights[name] if key == shards.WEIGHT else self.states[name][key]
        part: Tensor = whole.flatten()[start : start + numel]
        return part

    def keys(self, name: str) -> set[str]:
        state = self.states.get(name, {})
        return {shards.WEIGHT, *(key for key, value in state.items() if value.shape == self.weights[name].shape)}

    def scalars(self, name: str) -> dict[str, float]:
        state = self.states.get(name, {})
        return {key: float(value) for key, value in state.items() if key not in self.keys(name)}
