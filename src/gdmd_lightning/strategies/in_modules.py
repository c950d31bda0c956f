"""What a LightningModule calls that trains several networks, the same under every strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from torch import nn

from gdmd_lightning.strategies.multi_engine import MultiEngineDeepSpeedStrategy
from gdmd_lightning.strategies.sharding import Weights, fill
from gdmd_lightning.strategies.trained import alone


@contextmanager
def learning(module: pl.LightningModule, role: str) -> Iterator[None]:
    """Inside, only the submodule ``role`` learns: under every strategy, ``manual_backward`` reaches no other weights.

    With :class:`MultiEngineDeepSpeedStrategy`, losses go to the engine of this role.
    """
    strategy = module.trainer.strategy
    if isinstance(strategy, MultiEngineDeepSpeedStrategy):
        with strategy.learning(role):
            yield
        return
    with alone(module.get_submodule(role), module.parameters()):
        yield


def frozen(
    module: pl.LightningModule, build: Callable[[], nn.Module], weights: Weights, dtype: torch.dtype | None = None
) -> nn.Module:
    """Build a network that is not trained, under every strategy; see :meth:`MultiEngineDeepSpeedStrategy.frozen`."""
    strategy = module.trainer.strategy
    if isinstance(strategy, MultiEngineDeepSpeedStrategy):
        return strategy.frozen(build, weights, dtype)
    network = build()
    if dtype is not None:
        network.to(dtype)
    fill(network, weights)
    return network.requires_grad_(False).eval()
