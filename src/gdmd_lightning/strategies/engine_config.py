"""Configurations of DeepSpeed engines: what a strategy fixes, and what its user may add."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

RELEASE = (0, 19)
"""The release of DeepSpeed that this was written for; earlier ones lack what it needs."""
OURS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "managed_gradient_accumulation", "optimizer", "scheduler",
)  # fmt: skip
"""Keys of a DeepSpeed configuration that have no meaning here: the module decides."""


def engine_config(
    stage: int,
    dtype: torch.dtype | None,
    shared: Mapping[str, Any],
    own: Iterable[Mapping[str, Any]],
    *,
    trained: bool,
) -> dict[str, Any]:
    """DeepSpeed's configuration of an engine.

    Args:
        stage: ZeRO stage.
        dtype: Precision of the weights; ``None`` for float32.
        shared: What the user adds for all engines; a network that is not trained takes only offloading from it.
        own: What the user adds for this one, the last with precedence.
        trained: Whether the network is trained.
    """
    base: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        # The caller decides when a step is due, after any number of backward passes.
        "managed_gradient_accumulation": False,
    }
    if dtype == torch.bfloat16:
        base["bf16"] = {"enabled": True}
    elif dtype == torch.float16:
        base["fp16"] = {"enabled": True}
    if trained:
        base = _merged(base, shared)
    else:
        # Small parameters stay gathered otherwise, which adds up in a network of small layers.
        base["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if "offload_param" in shared.get("zero_optimization", {}):
            base["zero_optimization"]["offload_param"] = shared["zero_optimization"]["offload_param"]
    for each in own:
        base = _merged(base, each)
    return base


def check_installed() -> None:
    """Fail if DeepSpeed is missing or too old.

    Raises:
        MisconfigurationException: If it is.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise MisconfigurationException("MultiEngineDeepSpeedStrategy requires DeepSpeed: pip install deepspeed")
    found = version("deepspeed")
    if tuple(int(part) for part in found.split(".")[:2]) < RELEASE:
        wanted = ".".join(map(str, RELEASE))
        raise MisconfigurationException(f"MultiEngineDeepSpeedStrategy requires DeepSpeed {wanted}, this is {found}")


def check_config(configs: Mapping[str, Mapping[str, Any]]) -> None:
    """Fail if a user's configurations set what the module or the strategy decides.

    Args:
        configs: By role; that of all engines under the empty name.

    Raises:
        MisconfigurationException: If one does.
    """
    for role, config in configs.items():
        where = f"configs.{role}" if role else "config"
        for key in OURS:
            if key in config:
                raise MisconfigurationException(
                    f"{key} in the strategy's {where}: the module decides this, leave it out"
                )
        zero = config.get("zero_optimization", {})
        if "stage" in zero:
            raise MisconfigurationException(f"zero_optimization.stage in the strategy's {where}: use stage and stages")
        if any(zero.get(f"offload_{what}", {}).get("device") == "nvme" for what in ("optimizer", "param")):
            raise MisconfigurationException(f"offload to nvme in the strategy's {where} is not supported: use cpu")


def unknown_role(
    stages: Iterable[str], configs: Iterable[str], roles: Iterable[str]
) -> tuple[Literal["stages", "configs"], str] | None:
    """The first role that has settings but no optimizer, and where it has them; ``None`` if there is none.

    Args:
        stages: Names in ``stages``.
        configs: Names in ``configs``, of which ``frozen`` is not a role.
        roles: What optimizers train, as paths; their last names do as well.
    """
    known = {name for role in roles for name in (role, role.rpartition(".")[2])}
    if unknown := set(stages) - known:
        return "stages", min(unknown)
    if unknown := set(configs) - known - {"frozen"}:
        return "configs", min(unknown)
    return None


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dictionary with the values of another one in it."""
    out = copy.deepcopy(dict(base))
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merged(out[key], value) if both else copy.deepcopy(value)
    return out
