"""Strategies for Lightning that do not depend on the rest of this package."""

from gdmd_lightning.strategies.fully_sharded import FSDP2Strategy
from gdmd_lightning.strategies.multi_engine import MultiEngineDeepSpeedStrategy, Trained, frozen, learning
from gdmd_lightning.strategies.shards import ShardedCheckpoint, ShardError, consolidated

__all__ = [
    "FSDP2Strategy",
    "MultiEngineDeepSpeedStrategy",
    "ShardError",
    "ShardedCheckpoint",
    "Trained",
    "consolidated",
    "frozen",
    "learning",
]
