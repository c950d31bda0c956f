"""Networks that learn, each with an optimizer of its own, and one of them at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Trained:
    """A network with an optimizer of its own.

    Args:
        network: The network; its parameters with gradient are those of the optimizer.
        gradient_clipping: Largest gradient norm; 0 for no limit. That of the strategy's ``config`` or ``configs`` wins.
    """

    network: nn.Module
    gradient_clipping: float = 0.0


@contextmanager
def alone(network: nn.Module, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, only ``network`` learns: no gradient reaches those of ``parameters`` that it does not have."""
    mine = {id(parameter) for parameter in network.parameters()}
    others = [parameter for parameter in parameters if parameter.requires_grad and id(parameter) not in mine]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
