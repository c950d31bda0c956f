"""Roles as full copies of one network: full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.roles.base import Role, Roles, Trainable


class CopiedRoles(Roles):
    """Full copies of one network in its roles.

    The teacher keeps its precision; what learns, and what follows it, is float32, since updates of a thousandth of a
    weight are lost in bfloat16.

    Args:
        family: Says how a network is used.
        network: The teacher, already loaded; generator and fake score start as its copies.
        ema_decay: Of the averaged generator that is evaluated and exported.
        old_decay: Of the averaged generator that the policy objective calls old; ``None`` leaves that role out.
        snapshots: How many past states of the fake score are kept.
    """

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        *,
        ema_decay: float,
        old_decay: float | None = None,
        snapshots: int = 0,
    ) -> None:
        super().__init__(family, old=old_decay is not None, snapshots=snapshots)
        self.teacher = network.requires_grad_(False).eval()
        self.generator = copy.deepcopy(network).float()
        self.fake_score = copy.deepcopy(network).float()
        self.ema = _average(self.generator, ema_decay)
        self.old = None if old_decay is None else _average(self.generator, old_decay)
        self.snapshots = nn.ModuleList(copy.deepcopy(network).float() for _ in range(snapshots))
        # Between updates too: wrappers such as DDP look once, at the start, for what they are to synchronise.
        self.generator.requires_grad_(True)
        self.fake_score.requires_grad_(True)

    def parameters_of(self, role: Trainable) -> list[nn.Parameter]:
        """See :meth:`Roles.parameters_of`."""
        return list(self.standing_alone(role).parameters())

    def names_of(self, role: Role) -> list[str]:
        """See :meth:`Roles.names_of`."""
        return [name for name in self.state_dict() if name.startswith(f"{role}.")]

    def is_teachers(self, name: str) -> bool:
        """See :meth:`Roles.is_teachers`."""
        return name.startswith("teacher.")

    def standing_alone(self, role: Role) -> nn.Module:
        """See :meth:`Roles.standing_alone`; the copy itself."""
        match role:
            case "teacher":
                return self.teacher
            case "generator":
                return self.generator
            case "fake_score":
                return self.fake_score
            case "ema":
                return self.ema.module
            case "old":
                assert self.old is not None
                return self.old.module

    @torch.no_grad()
    def after_generator_update(self) -> None:
        """See :meth:`Roles.after_generator_update`."""
        self.ema.update_parameters(self.generator)
        if self.old is not None:
            self.old.update_parameters(self.generator)

    @torch.no_grad()
    def keep_snapshot(self, slot: int) -> None:
        """See :meth:`Roles.keep_snapshot`."""
        self.snapshots[slot].load_state_dict(self.fake_score.state_dict())

    @torch.no_grad()
    def restart_old(self) -> None:
        """See :meth:`Roles.restart_old`."""
        if self.old is not None:
            self.old.module.load_state_dict(self.generator.state_dict())

    def checkpoint_activations(self) -> None:
        """See :meth:`Roles.checkpoint_activations`."""
        for network in (self.generator, self.fake_score):
            network.enable_gradient_checkpointing()  # type: ignore[operator]

    @contextmanager
    def _speaking(self, role: Role, snapshot: int = 0) -> Iterator[nn.Module]:
        yield self.snapshots[snapshot - 1] if role == "fake_score" and snapshot else self.standing_alone(role)

    def _train(self, role: Trainable, mode: bool) -> None:
        self.standing_alone(role).train(mode)


def _average(network: nn.Module, decay: float) -> AveragedModel:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.n_averaged.fill_(1)  # its first update would otherwise take the network over whole
    return average.requires_grad_(False).eval()
