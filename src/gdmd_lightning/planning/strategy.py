"""The strategy of a configuration, as far as a plan must know it: how each role is split over how many GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException

from gdmd_lightning.engines.deepspeed import check_stages
from gdmd_lightning.engines.fsdp import check_sharding
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.planning.sharding import Split
from gdmd_lightning.roles import TEACHER
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy

BUCKET, PREFETCH, STAYS_WHOLE = 500_000_000, 50_000_000, 100_000
"""DeepSpeed's own settings, where a configuration has none."""


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


def read_strategy(trainer: Any, module: DistillationModule) -> Strategy:
    """What the ``trainer`` part of a parsed configuration says.

    Args:
        trainer: Its settings.
        module: What is trained, before ``configure_model``.

    Raises:
        UserError: If the strategy cannot be planned, or its number of GPUs is not given.
    """
    given = trainer.strategy
    name, settings = (given, {}) if isinstance(given, str) else (str(given.class_path), dict(given.init_args or {}))
    short, nodes = name.rpartition(".")[2], int(trainer.num_nodes)
    count = _count(trainer.devices)
    if short in ("MultiEngineDeepSpeedStrategy", "FSDP2Strategy"):
        if count is None:
            raise UserError(
                f"it is {trainer.devices!r}, and the share of a GPU depends on their number",
                where="trainer.devices",
                remedy="give the number per node, such as --trainer.devices 8",
            )
        if short == "FSDP2Strategy":
            return _fsdp2(count, nodes, module)
        return _deepspeed(settings, count, nodes, module)
    if name != "auto" and not short.lower().startswith(("ddp", "single")):
        raise UserError(
            f"{name!r} is not planned yet",
            where="trainer.strategy",
            remedy="use ddp, MultiEngineDeepSpeedStrategy or FSDP2Strategy",
        )
    ranks = (count or 1) * nodes
    ddp = short.lower().startswith("ddp") or ranks > 1
    if not ddp:
        return ALONE
    number = f"{ranks} GPUs" if count is not None else "as many GPUs as there are"
    return Strategy(ranks, count or 1, ddp=True, words=f"ddp on {number}: each holds everything")


def _deepspeed(settings: dict[str, Any], count: int, nodes: int, module: DistillationModule) -> Strategy:
    try:
        strategy = MultiEngineDeepSpeedStrategy(**settings)
    except MisconfigurationException as error:
        raise UserError(" ".join(str(error).split()), where="trainer.strategy") from error
    adapters, ranks = module.lora is not None, count * nodes
    specs = module.role_specs()
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
    words = f"DeepSpeed, ZeRO {' and '.join(map(str, stages))} on {ranks} GPUs"
    return Strategy(ranks, count, splits, words=f"{words}: largest share of a GPU")


def _zero(config: dict[str, Any], stage: int, ranks: int) -> Split:
    zero = config["zero_optimization"]
    return Split(
        f"zero{stage}",  # type: ignore[arg-type]
        ranks,
        stays_whole=int(zero.get("stage3_param_persistence_threshold", STAYS_WHOLE)),
        bucket=int(zero.get("reduce_bucket_size", BUCKET)) * (2 if zero.get("overlap_comm") and stage < 3 else 1),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
        offload_optimizer=_is_cpu(zero, "offload_optimizer"),
        offload_weights=stage == 3 and _is_cpu(zero, "offload_param"),
    )


def _frozen(config: dict[str, Any], ranks: int) -> Split:
    zero = config["zero_optimization"]
    return Split(
        "zero3",
        ranks,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
        stays_whole=int(zero.get("stage3_param_persistence_threshold", 0)),
        offload_weights=_is_cpu(zero, "offload_param"),
    )


def _is_cpu(zero: dict[str, Any], what: str) -> bool:
    return (zero.get(what) or {}).get("device", "none") == "cpu"


def _fsdp2(count: int, nodes: int, module: DistillationModule) -> Strategy:
    ranks = count * nodes
    check_sharding(FSDP2Strategy(), module.role_specs())
    # Adapters are whole; heads and copies of the network are in shards.
    split = [spec.name for spec in module.role_specs() if module.lora is None or spec.head is not None]
    splits = {name: Split("fsdp2", ranks) for name in (TEACHER, *split)}
    return Strategy(ranks, count, splits, words=f"FSDP2 on {ranks} GPUs: largest share of a GPU")


def _count(devices: Any) -> int | None:
    """GPUs of a node, ``None`` for all there are."""
    if isinstance(devices, list):
        return len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return None
    return int(text) if text.isdigit() else len([each for each in text.split(",") if each.strip()])
