"""The strategy of a configuration, as far as a plan must know it: how each role is split over how many GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies import Strategy as PlStrategy

from gdmd_lightning.configuration.launching import chosen_strategy, devices_per_node
from gdmd_lightning.engines.deepspeed import check_stages
from gdmd_lightning.engines.fsdp import check_sharding
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.planning.sharding import Split
from gdmd_lightning.roles import TEACHER
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy
from gdmd_lightning.strategies.engine_config import zero_settings


@dataclass(frozen=True)
class Strategy:
    """How a run is spread over GPUs.

    Args:
        ranks: Number of GPUs.
        per_host: GPUs of one host.
        splits: How roles are split, and ``teacher``; the others are whole.
        ddp: Whether gradients are averaged in DDP's buckets.
        words: What the report says about it; empty for a single GPU.
    """

    ranks: int = 1
    per_host: int = 1
    splits: Mapping[str, Split] = field(default_factory=dict)
    ddp: bool = False
    words: str = ""

    def split_of(self, role: str) -> Split:
        """How a role is split."""
        return self.splits.get(role, Split())


ALONE = Strategy()


def read_strategy(trainer: Any, module: DistillationModule, *, divided: bool = False) -> Strategy:
    """What the ``trainer`` part of a parsed configuration says.

    Args:
        trainer: Its settings.
        module: What is trained, before ``configure_model``.
        divided: Whether the GPUs divide the samples of an update, so that a plan depends on their number.

    Raises:
        UserError: If the strategy cannot be planned, or its number of GPUs is not given.
    """
    kind, settings = chosen_strategy(trainer.strategy)
    nodes, count = int(trainer.num_nodes), devices_per_node(trainer.devices)
    sharded = issubclass(kind, MultiEngineDeepSpeedStrategy | FSDP2Strategy)
    if not sharded and kind is not PlStrategy and not issubclass(kind, DDPStrategy | SingleDeviceStrategy):
        raise UserError(
            f"{kind.__name__} is not planned yet",
            where="trainer.strategy",
            remedy="use ddp, MultiEngineDeepSpeedStrategy or FSDP2Strategy",
        )
    if count is None and (sharded or divided):
        what = "the share of a GPU" if sharded else "a GPU's part of data.global_batch_size"
        raise UserError(
            f"it is {trainer.devices!r}, and {what} depends on their number",
            where="trainer.devices",
            remedy="give the number per node, such as --trainer.devices 8",
        )
    ranks = (count or 1) * nodes
    if issubclass(kind, FSDP2Strategy):
        return _fsdp2(ranks, count or 1, module)
    if sharded:
        return _deepspeed(settings, ranks, count or 1, module)
    if not issubclass(kind, DDPStrategy) and ranks == 1:
        return ALONE
    number = _gpus(ranks) if count is not None else "as many GPUs as there are"
    return Strategy(ranks, count or 1, ddp=True, words=f"ddp on {number}: each holds everything")


def _gpus(number: int) -> str:
    return f"{number} GPU{'' if number == 1 else 's'}"


def _deepspeed(settings: Mapping[str, Any], ranks: int, per_host: int, module: DistillationModule) -> Strategy:
    try:
        strategy = MultiEngineDeepSpeedStrategy(**settings)
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split()), where="trainer.strategy") from error
    adapters, specs = module.lora is not None, module.role_specs()
    check_stages(strategy, specs, adapters=adapters)
    splits: dict[str, Split] = {}
    for spec in specs:
        stage = strategy.stage_of(spec.source or spec.name)
        if spec.optimizer is not None:
            splits[spec.name] = _zero(strategy.config_of(spec.name, stage), stage, ranks)
        elif stage == 3 and not adapters:
            splits[spec.name] = _frozen(strategy.config_of("frozen", 3), ranks)
    if strategy.shard_frozen and not adapters:
        splits[TEACHER] = _frozen(strategy.config_of("frozen", 3), ranks)
    stages = sorted({strategy.stage_of(spec.name) for spec in specs if spec.optimizer is not None})
    words = f"DeepSpeed, ZeRO {' and '.join(map(str, stages))} on {_gpus(ranks)}"
    return Strategy(ranks, per_host, splits, words=f"{words}: largest share of a GPU")


def _zero(config: dict[str, Any], stage: int, ranks: int) -> Split:
    zero = zero_settings(config)
    return Split(
        f"zero{stage}",  # type: ignore[arg-type]
        ranks,
        stays_whole=zero.param_persistence_threshold,
        bucket=zero.reduce_bucket_size * (2 if zero.overlap_comm and stage < 3 else 1),
        prefetch=zero.prefetch_bucket_size,
        offload_optimizer=_is_cpu(zero.offload_optimizer),
        offload_weights=stage == 3 and _is_cpu(zero.offload_param),
    )


def _frozen(config: dict[str, Any], ranks: int) -> Split:
    zero = zero_settings(config)
    return Split(
        "zero3",
        ranks,
        prefetch=zero.prefetch_bucket_size,
        stays_whole=zero.param_persistence_threshold,
        offload_weights=_is_cpu(zero.offload_param),
    )


def _is_cpu(offload: Any) -> bool:
    return offload is not None and offload.device == "cpu"


def _fsdp2(ranks: int, per_host: int, module: DistillationModule) -> Strategy:
    check_sharding(FSDP2Strategy(), module.role_specs())
    # Adapters are whole; heads and copies of the network are in shards.
    split = [spec.name for spec in module.role_specs() if module.lora is None or spec.head is not None]
    splits = {name: Split("fsdp2", ranks) for name in (TEACHER, *split)}
    return Strategy(ranks, per_host, splits, words=f"FSDP2 on {_gpus(ranks)}: largest share of a GPU")
