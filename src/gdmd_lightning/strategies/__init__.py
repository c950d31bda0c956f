"""Strategies for Lightning that do not depend on the rest of this package."""

from gdmd_lightning.strategies.fully_sharded import FSDP2Strategy
from gdmd_lightning.strategies.in_modules import frozen, learning
from gdmd_lightning.strategies.multi_engine import MultiEngineDeepSpeedStrategy
from gdmd_lightning.strategies.shards import ShardedCheckpoint, ShardError, consolidated
from gdmd_lightning.strategies.trained import Trained

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
