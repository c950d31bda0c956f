"""States of the global random generators, as tensors and plain values that a checkpoint can hold.

The package draws from named streams only. A reward or a logger may draw from the global generators; with their
states in the checkpoint a resumed run draws the same numbers as one without a break.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import distributed


def global_states(device: torch.device) -> list[dict[str, Any]]:
    """States of torch's, numpy's and Python's generators, one entry per rank; all ranks must call this."""
    legacy: Any = np.random.get_state(legacy=True)
    kind, keys, position, has_gauss, gauss = legacy
    mine: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": random.getstate(),
    }
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    if not (distributed.is_available() and distributed.is_initialized()):
        return [mine]
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    return every


def restore_global_states(states: list[dict[str, Any]], device: torch.device, rank: int) -> None:
    """Continue the generators of this rank where :func:`global_states` found them.

    A rank that was not there continues the generators of one that was.

    Raises:
        ValueError, TypeError, LookupError, ArithmeticError, RuntimeError: If the states
            are not what :func:`global_states` returns.
    """
    mine = states[rank % len(states)]
    kind, keys, *rest = mine["numpy"]
    torch.set_rng_state(mine["torch"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(mine["python"])
    if device.type == "cuda" and "cuda" in mine:
        torch.cuda.set_rng_state(mine["cuda"], device)
