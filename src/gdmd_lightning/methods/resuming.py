"""What a resumed run does with each setting: it takes effect from the next update on, or it is refused by name.

The tables below have every key of ``model`` and ``data``; a test enforces that each is in exactly one of them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.provenance import Provenance, parsed

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule

TAKES_EFFECT = (
    "model.*.learning_rate", "model.*.betas", "model.*.weight_decay", "model.*.gradient_clip", "model.*.warmup",
    "model.*.schedule", "model.*.final_learning_rate_factor", "model.non_finite.*",
    "model.reward", "model.reward.*", "model.margin", "model.weight",
    "model.targets.size", "model.targets.snapshot_every", "model.advantages.*", "model.lambda_policy",
    "model.policy.at", "model.policy.normalize", "model.policy.beta", "model.policy.old_decay",
    "model.matching.*", "model.steps", "model.sampler", "model.sampler.*", "model.height", "model.width",
    "model.memory.*", "model.speed.*", "model.micro_batch_size", "model.embedding_cache", "model.embedding_cache.*",
    "model.ema_decay", "model.seed", "data.num_workers",
)  # fmt: skip
"""Used from the next update on."""

REFUSED = (
    "model.class_path", "model.family", "model.family.*", "model.lora", "model.lora.*", "model.*.algorithm",
    "model.start_from", "model.accumulate", "data.source", "data.column", "data.split", "data.batch_size",
    "data.global_batch_size", "data.group_size", "data.shuffle_buffer", "data.seed",
)  # fmt: skip
"""Refused if changed: the weights, moments or counts in the checkpoint have no meaning under another value.

``model.family.path``, ``model.start_from`` and ``data.source`` are compared by content, so they may move;
``model.accumulate``, ``data.batch_size`` and ``data.global_batch_size`` by the samples of an update on all ranks.
"""

REFUSED_WITH_THE_ROLES = ("model.policy.form", "model.targets.over", "model.targets.snapshots")
"""Refused if the change adds or removes a role, which :func:`check_fits` finds; otherwise they take effect."""

WAY_OUT = "resume with the settings of the checkpoint, or start a new run with model.start_from"


def classes_of(key: str) -> list[tuple[str, ...]]:
    """The tables that have a key, such as ``model.lora.rank``."""
    tables = (TAKES_EFFECT, REFUSED, REFUSED_WITH_THE_ROLES)
    return [table for table in tables if any(fnmatchcase(key, pattern) for pattern in table)]


def fixed_settings(module: RoleModule) -> dict[str, Any]:
    """The settings of ``model`` that cannot change on resume, by key; those compared by content are left out."""
    settings: dict[str, Any] = {"model": type(module).__name__, "model.family": type(module.family).__name__}
    for name, value in module.family.encoding_settings().items():
        settings[f"model.family.{name}"] = list(value) if isinstance(value, tuple) else value
    for spec in module.role_specs():
        if spec.optimizer is not None:
            settings[f"model.{spec.name}.algorithm"] = spec.optimizer.algorithm
    return settings | adapter_settings(module)


def adapter_settings(module: RoleModule) -> dict[str, Any]:
    """Rank, alpha and targets of the adapters, all ``None`` for full copies; and whether they started merged."""
    lora = module.lora
    if lora is None:
        return dict.fromkeys(("model.lora.rank", "model.lora.alpha", "model.lora.targets"))
    targets = sorted(set(lora.targets or module.family.lora_targets))
    settings = {"model.lora.rank": lora.rank, "model.lora.alpha": lora.alpha, "model.lora.targets": targets}
    # Left out if it is the default, which earlier versions did not record.
    return settings | ({"model.lora.start": lora.start} if lora.start == "merged" else {})


def check_resumable(module: RoleModule, origin: Provenance, started_from: str) -> None:
    """Fail if a run cannot continue from a checkpoint: other fixed settings, teacher or start.

    What a checkpoint of an earlier version does not record is not compared.

    Args:
        module: The resumed run's module, with its roles built.
        origin: The checkpoint's provenance.
        started_from: Digest of the checkpoint named by ``model.start_from``, empty for none.

    Raises:
        UserError: If it cannot; the message names every setting that differs.
    """
    if origin.settings:
        raise_if_changed(origin.settings, fixed_settings(module))
    check_teacher(module, origin)
    if started_from and origin.settings and started_from != origin.started_from:
        raise UserError(
            "the checkpoint's run did not start from this checkpoint, and a resumed run ignores it",
            where=f"model.start_from {module.start_from!r}",
            remedy="give only one of ckpt_path and model.start_from",
        )


def raise_if_changed(there: dict[str, Any], here: dict[str, Any], remedy: str = WAY_OUT) -> None:
    """Fail if settings differ.

    Raises:
        UserError: The message has every key that differs, with both values.
    """
    keys = changed_keys(there, here)
    if keys:
        values = ", ".join(f"{key} {there.get(key)!r} (now {here.get(key)!r})" for key in keys)
        raise UserError(f"it was trained with {values}", where="checkpoint", remedy=remedy)


def changed_keys(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Keys of settings that differ; a missing one is ``None``."""
    return [key for key in {**there, **here} if there.get(key) != here.get(key)]


def check_teacher(module: RoleModule, origin: Provenance) -> None:
    """Fail if a checkpoint was trained with another teacher; a checkpoint of an earlier version does not say.

    Raises:
        UserError: If the weights differ.
    """
    if origin.teacher and origin.teacher != module.teacher_digest:
        raise UserError(
            f"it was trained with another teacher: the weights in {module.family.path!r} differ",
            where="checkpoint",
            remedy="give the directory of its teacher: --teacher DIRECTORY, or for fit model.family.path",
        )


def use_current_optimization(module: RoleModule, checkpoint: dict[str, Any]) -> None:
    """Replace the optimizers' settings and the schedules in a checkpoint by those that the module has now.

    The moments stay. The learning rates become those that a run with the current settings has at this update, so
    unchanged settings give the same numbers to the bit.

    Raises:
        UserError: If the checkpoint has no optimizers, or they do not belong to the trained roles.
    """
    states, current = checkpoint.get("optimizer_states"), module.configure_optimizers()
    if not states or "loops" not in checkpoint:
        raise UserError(
            "it has no optimizer states, only weights",
            where="checkpoint",
            remedy="start a new run from its weights with model.start_from",
        )
    if not _well_formed(states, current) or not isinstance(checkpoint.get("lr_schedulers"), list):
        raise UserError("its optimizer states are not those of the trained roles", where="checkpoint", remedy=WAY_OUT)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for each in current:
            for _ in range(module.updates):
                each["lr_scheduler"]["scheduler"].step()
    for state, each in zip(states, current, strict=True):
        groups = each["optimizer"].state_dict()["param_groups"]
        state["param_groups"] = [
            {**now, "params": then["params"]} for now, then in zip(groups, state["param_groups"], strict=True)
        ]
        parameters = [parameter for group in each["optimizer"].param_groups for parameter in group["params"]]
        numbers = [number for group in state["param_groups"] for number in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            moments = state["state"].get(number)
            if isinstance(moments, dict):
                state["state"][number] = {name: _laid_out_as(parameter, value) for name, value in moments.items()}
    checkpoint["lr_schedulers"] = [each["lr_scheduler"]["scheduler"].state_dict() for each in current]


def _laid_out_as(parameter: Tensor, value: Any) -> Any:
    """A moment in the memory layout of its parameter, which a fused step takes for granted; other values as they are.

    A checkpoint keeps the layout that the weights had in the run that wrote it.
    """
    if not isinstance(value, Tensor) or value.shape != parameter.shape or value.stride() == parameter.stride():
        return value
    laid_out = torch.empty_strided(value.shape, parameter.stride(), dtype=value.dtype, device=value.device)
    return laid_out.copy_(value)


def _well_formed(states: Any, current: list[dict[str, Any]]) -> bool:
    """Whether optimizer states have the form that torch gives them for the current optimizers."""
    if not isinstance(states, list) or len(states) != len(current):
        return False
    for state, each in zip(states, current, strict=True):
        groups = state.get("param_groups") if isinstance(state, dict) else None
        now = each["optimizer"].param_groups
        if not isinstance(groups, list) or len(groups) != len(now) or not isinstance(state.get("state"), dict):
            return False
        for theirs, mine in zip(groups, now, strict=True):
            names = theirs.get("params") if isinstance(theirs, dict) else None
            if not isinstance(names, list) or len(names) != len(mine["params"]):
                return False
    return True


def report_changes(there: str, here: str) -> None:
    """Log which settings of ``model`` differ between two configurations, as YAML, and take effect now."""
    before, now = dict(flattened(parsed(there))), dict(flattened(parsed(here)))
    for key in sorted(before.keys() | now.keys()):
        if TAKES_EFFECT in classes_of(key) and before.get(key) != now.get(key):
            rank_zero_info(f"resumed with {key} {now.get(key)} (before: {before.get(key)})")


def flattened(settings: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Keys and values of a configuration's leaves; ``init_args`` is left out of the keys.

    The class of a component is the value of its own key, and that of the method is ``model.class_path``.
    """
    if isinstance(settings, dict) and settings:
        for name, value in settings.items():
            if name == "init_args":
                yield from flattened(value, at) if value else ()
            elif name == "class_path" and at != "model":
                yield at, value
            else:
                yield from flattened(value, f"{at}.{name}" if at else str(name))
    else:
        yield at, settings
