"""What starts the ranks of a run: ``fit`` itself, torchrun or SLURM."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pydoc import locate
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, Strategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.distributed import Backend

from gdmd_lightning.configuration.suggestions import did_you_mean
from gdmd_lightning.engines.fsdp import check_kind
from gdmd_lightning.engines.precision import check_precision
from gdmd_lightning.errors import UserError
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, torchrun gives the ranks of each start a store of their own. Source: torch's ``dynamic_rendezvous.py``."""


def check_trainer(trainer: Any) -> None:
    """Refuse a strategy, devices or a precision that cannot train several roles, before anything is built.

    Args:
        trainer: The ``trainer`` part of a parsed configuration.

    Raises:
        UserError: If one cannot.
    """
    devices_per_node(trainer.devices)
    if trainer.num_nodes < 1:
        raise UserError(f"it is {trainer.num_nodes}", where="trainer.num_nodes", remedy="use an integer of at least 1")
    kind, settings = chosen_strategy(trainer.strategy)
    if issubclass(kind, DeepSpeedStrategy):
        raise UserError(
            "Lightning's own DeepSpeedStrategy takes one optimizer, and each role has its own",
            where="trainer.strategy",
            remedy="use MultiEngineDeepSpeedStrategy, or --config zero3.yaml",
        )
    check_kind(kind)
    if settings.get("start_method", "popen") != "popen":
        raise no_command_line(trainer.strategy)
    if settings.get("static_graph"):
        raise UserError(
            "it is true, but the backward passes of an update reach different roles",
            where="trainer.strategy.static_graph",
            remedy="leave it out",
        )
    _check_backend(settings.get("process_group_backend"))
    check_precision(trainer.precision, sharded=issubclass(kind, MultiEngineDeepSpeedStrategy | FSDP2Strategy))


def chosen_strategy(given: Any) -> tuple[type[Strategy], Mapping[str, Any]]:
    """Class and arguments of a strategy; ``Strategy`` itself for ``auto``.

    Args:
        given: ``trainer.strategy`` as it was parsed: a name, or a class with its arguments.

    Raises:
        UserError: If there is no such name, or it is that of a class, which Lightning takes for one of its own.
    """
    if not isinstance(given, str):
        return locate(given.class_path), dict(getattr(given, "init_args", None) or {})  # type: ignore[return-value]
    if given in {each.__name__ for each in _below(Strategy)}:
        raise UserError(
            f"{given!r} is a class, and a bare word here is one of Lightning's own names",
            where="trainer.strategy",
            remedy=f"use --trainer.strategy.class_path {given}",
        )
    if given == "auto":
        return Strategy, {}
    if given.lower() not in StrategyRegistry:
        remedy = did_you_mean(given, ["auto", "ddp", "FSDP2Strategy", "MultiEngineDeepSpeedStrategy"])
        raise UserError(f"unknown strategy {given!r}", where="trainer.strategy", remedy=remedy)
    entry = StrategyRegistry[given.lower()]
    return entry["strategy"], entry["init_params"]


def devices_per_node(devices: Any) -> int | None:
    """Number of GPUs, or processes on a CPU, of each node; ``None`` for all GPUs there are.

    Args:
        devices: ``trainer.devices`` as it was parsed: a number, a list of GPUs, either as text, or ``auto``.

    Raises:
        UserError: If it is none of these.
    """
    text = ",".join(map(str, devices)) + "," if isinstance(devices, list) else str(devices).strip()
    if text in ("auto", "-1"):
        return None
    listed = [each.strip() for each in text.split(",") if each.strip()]
    if not listed or not all(each.isdecimal() for each in listed) or ("," not in text and int(text) < 1):
        remedy = "use a number of at least 1, a list such as 0,1, or auto"
        raise UserError(f"it is {devices!r}", where="trainer.devices", remedy=remedy)
    return len(listed) if "," in text else int(text)


def no_command_line(strategy: Any) -> UserError:
    """The error for a strategy whose processes are not started by a command."""
    name = strategy if isinstance(strategy, str) else strategy.class_path.rpartition(".")[2]
    what = f"{name!r} starts its processes without a command line of their own"
    return UserError(what, where="trainer.strategy", remedy="use ddp")


def _check_backend(given: str | None) -> None:
    """Refuse a backend that torch does not know; for each kind of device, it can be ``cpu:gloo,cuda:nccl``."""
    for name in [] if given is None else [part.rpartition(":")[2] for part in given.split(",")]:
        if name.lower() not in Backend.backend_list:
            where = "trainer.strategy.process_group_backend"
            raise UserError(f"there is no backend {name!r}", where=where, remedy=did_you_mean(name, ["gloo", "nccl"]))


def check_launcher(trainer: Trainer) -> None:
    """Fail before anything is loaded if torchrun or SLURM started another number of ranks than the trainer expects.

    Warns if torchrun is to start ranks again and they might not find each other.

    Raises:
        UserError: If the numbers differ.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is not None:
        try:
            environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
        except ValueError as error:
            remedy = "set trainer.devices and trainer.num_nodes to what torchrun or SLURM starts"
            raise UserError(str(error), where="trainer.devices", remedy=remedy) from error
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        rank_zero_warn(
            "Ranks that torchrun starts again may look for those that have ended, since all starts share one store: "
            f"set {OWN_STORE}=1 for torchrun."
        )


def check_requeued(trainer: Trainer) -> None:
    """Refuse to start where Lightning would continue from ``hpc_ckpt_N.ckpt``, unasked; call it without a checkpoint.

    Raises:
        UserError: If it would: under SLURM, with such a file in ``trainer.default_root_dir``.
    """
    left = trainer._checkpoint_connector._hpc_resume_path
    if left is not None and SLURMEnvironment.detect():
        raise UserError(
            "Lightning saved it in the middle of an update, and would continue from it without being asked",
            where=left,
            remedy="remove it, or give trainer.default_root_dir another place",
        )


def _below(kind: type) -> set[type]:
    """All subclasses."""
    children: list[type] = kind.__subclasses__()
    return set(children).union(*map(_below, children))
