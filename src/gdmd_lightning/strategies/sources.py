"""Where a rank reads its part of weights and moments from: a checkpoint in shards, or one that one process wrote."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, Protocol

from torch import Tensor

from gdmd_lightning.strategies import shards


class Source(Protocol):
    """Weights and moments by the name of their parameter."""

    def names(self) -> Set[str]:
        """Names of everything that has a value."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a weight or buffer, empty if it is no tensor."""
        ...

    def whole(self, name: str) -> Any:
        """A whole weight, or whatever a module's state dict has under this name."""
        ...

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
    return _Sharded(checkpoint) if "sharded" in checkpoint else _Plain(checkpoint, groups)


class _Sharded:
    """A checkpoint in shards. Networks without an optimizer are in pieces or whole, as the ZeRO stage was."""

    def __init__(self, checkpoint: Mapping[str, Any]) -> None:
        self.reader = shards.ShardedCheckpoint(checkpoint["sharded"])
        self.rest = _Plain({"state_dict": checkpoint["state_dict"]}, {})

    def names(self) -> Set[str]:
        return self.reader.index.keys() | self.rest.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._of(name).shape(name)

    def whole(self, name: str) -> Any:
        return self._of(name).whole(name)

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        return self._of(name).read(name, key, start, numel)

    def keys(self, name: str) -> set[str]:
        return self._of(name).keys(name)

    def scalars(self, name: str) -> dict[str, float]:
        return self._of(name).scalars(name)

    def _of(self, name: str) -> shards.ShardedCheckpoint | _Plain:
        return self.reader if name in self.reader.index else self.rest


class _Plain:
    """A checkpoint that one process wrote; arguments as above."""

    def __init__(self, checkpoint: Mapping[str, Any], groups: Mapping[str, list[list[str]]]) -> None:
        self.weights = checkpoint["state_dict"]
        self.states: dict[str, Mapping[str, Any]] = {}
        for state, names in zip(checkpoint.get("optimizer_states", []), groups.values(), strict=False):
            flat = [name for group in names for name in group]
            self.states |= {flat[number]: own for number, own in state["state"].items()}

    def names(self) -> Set[str]:
        return self.weights.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(getattr(self.weights[name], "shape", ()))

    def whole(self, name: str) -> Any:
        return self.weights[name]

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
