"""What starts the ranks of a run: ``fit`` itself, torchrun or SLURM."""

from __future__ import annotations

import os
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from gdmd_lightning.errors import UserError

OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""Set to 1, torchrun gives the ranks of each start a store of their own. Source: torch's ``dynamic_rendezvous.py``."""


def check_strategy(strategy: Any) -> None:
    """Refuse a strategy that cannot train several roles, before anything is built.

    Args:
        strategy: ``trainer.strategy`` as it was parsed: a name, or a class with its arguments.

    Raises:
        UserError: If it is the bare name of a class, which Lightning takes for a name in its own list, or has a setting
            that cannot work.
    """
    if isinstance(strategy, str) and strategy in {each.__name__ for each in _below(Strategy)}:
        raise UserError(
            f"{strategy!r} is a class, and a bare word here is one of Lightning's own names",
            where="trainer.strategy",
            remedy=f"use --trainer.strategy.class_path {strategy}",
        )
    settings = {} if isinstance(strategy, str) else strategy.get("init_args") or {}
    if settings.get("static_graph"):
        raise UserError(
            "it is true, but the backward passes of an update reach different roles",
            where="trainer.strategy.static_graph",
            remedy="leave it out",
        )


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


def _below(kind: type) -> set[type]:
    """All subclasses."""
    children: list[type] = kind.__subclasses__()
    return set(children).union(*map(_below, children))
