"""Configurations of DeepSpeed engines: what a strategy fixes, and what its user may add."""

from __future__ import annotations

import copy
import difflib
import importlib.util
from collections.abc import Iterable, KeysView, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException

if TYPE_CHECKING:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

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


def check_config(configs: Mapping[str, Mapping[str, Any]], stages: Mapping[str, int]) -> None:
    """Fail if a user's configurations set what the module or the strategy decides, or are not what DeepSpeed reads.

    Args:
        configs: By role; that of all engines under the empty name.
        stages: ZeRO stages by role; that of all other roles under the empty name.

    Raises:
        MisconfigurationException: If one does.
    """
    for role, config in configs.items():
        where = f"configs.{role}" if role else "config"
        zero = config.get("zero_optimization", {}) if isinstance(config, dict) else None
        if not isinstance(zero, dict):
            what = "zero_optimization in the strategy's" if isinstance(config, dict) else "the strategy's"
            raise MisconfigurationException(f"{what} {where} must be a dictionary")
        for key in OURS:
            if key in config:
                raise MisconfigurationException(
                    f"{key} in the strategy's {where}: the module decides this, leave it out"
                )
        if "stage" in zero:
            raise MisconfigurationException(f"zero_optimization.stage in the strategy's {where}: use stage and stages")
        for what in ("optimizer", "param"):
            offload = zero.get(f"offload_{what}")
            device = offload.get("device", "none") if isinstance(offload, dict) else "none"
            if device not in ("none", "cpu"):
                raise MisconfigurationException(
                    f"offload to {device} in the strategy's {where} is not supported: use cpu"
                )
        clipping = config.get("gradient_clipping", 0)
        if isinstance(clipping, bool) or not isinstance(clipping, int | float) or not clipping >= 0:
            raise MisconfigurationException(
                f"gradient_clipping in the strategy's {where} is {clipping!r}: use a number of at least 0"
            )
        shared, own = configs.get("", {}), [config] if role else []
        if role == "frozen":
            check_engine(engine_config(3, None, shared, own, trained=False), where)
        elif config:
            usual = stages.get(role.rpartition(".")[2], stages[""])
            for stage in sorted({stages.get(role, usual)} if role else set(stages.values())):
                check_engine(engine_config(stage, None, shared, own, trained=True), where)


def check_engine(config: Mapping[str, Any], where: str) -> None:
    """Fail if DeepSpeed cannot read an engine's configuration, or does not look at all of it.

    Args:
        config: The whole configuration, from :func:`engine_config`.
        where: What a user calls the part that they gave.

    Raises:
        MisconfigurationException: If so.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    watched = _Watched(copy.deepcopy(dict(config)))
    try:
        parsed = DeepSpeedConfig(watched)
    except Exception as error:  # a wrong value raises whatever its reader stumbles over
        raise MisconfigurationException(_complaint(error, watched.read[-1], config, where)) from error
    for key in config:
        if key not in watched.read:
            raise MisconfigurationException(_unknown_key(key, watched.read, where))
    if parsed.zero_config.overlap_comm and parsed.zero_config.stage == 1:
        raise MisconfigurationException(
            f"zero_optimization.overlap_comm in the strategy's {where} does not work in ZeRO stage 1: use stage 2"
        )


def zero_settings(config: Mapping[str, Any]) -> DeepSpeedZeroConfig:
    """The settings of ZeRO as DeepSpeed takes them, with its own where a configuration has none, or ``auto``."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    return DeepSpeedZeroConfig(**config["zero_optimization"])


class _Watched(dict[str, Any]):
    """A configuration that notes which keys are looked for, since DeepSpeed has no list of them."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.read: list[str] = []

    def __contains__(self, key: object) -> bool:
        self.read.append(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.read.append(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.read.append(key)
        return super().get(key, default)

    def keys(self) -> KeysView[str]:  # type: ignore[override]
        return KeysView(self)


def _complaint(error: Exception, key: str, config: Mapping[str, Any], where: str) -> str:
    """What DeepSpeed says about the value of a key, in one line."""
    from deepspeed.runtime.config_utils import DeepSpeedConfigModel
    from pydantic import ValidationError

    text, value, path = str(error), config.get(key), [key]
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        path += map(str, first["loc"])
        if first["type"] == "extra_forbidden":
            return _unknown_key(".".join(path), _fields(DeepSpeedConfigModel), where)
        text = first["msg"].partition(", ")[2] if first["type"] in ("value_error", "assertion_error") else first["msg"]
        value = first["input"] if first["loc"] else value
    elif isinstance(error, AttributeError) or "must be a mapping" in text:
        text = "it must be a dictionary"
    given = "" if isinstance(value, dict) else f" is {value!r}"
    return " ".join(f"{'.'.join(path)} in the strategy's {where}{given}: {text}".split())


def _unknown_key(path: str, known: Iterable[str], where: str) -> str:
    near = difflib.get_close_matches(path.rpartition(".")[2], known, n=1, cutoff=0.65)
    remedy = f" (did you mean {near[0]!r}?)" if near else ": DeepSpeed does not read it"
    return f"unknown key {path!r} in the strategy's {where}{remedy}"


def _fields(model: Any) -> set[str]:
    """Names of all settings in the groups of DeepSpeed's configuration."""
    own = {name for key, field in model.model_fields.items() for name in (key, field.alias) if name}
    return own.union(*map(_fields, model.__subclasses__()))


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
