"""Roles as full copies of one network: full fine-tuning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.roles.base import Roles
from gdmd_lightning.roles.heads import FeatureHead
from gdmd_lightning.roles.spec import TEACHER, RoleSpec


class CopiedRoles(Roles):
    """Full copies of one network, one per role.

    The teacher keeps its precision. All other roles are float32, since bfloat16 rounds away updates of a
    thousandth of a weight.

    Args:
        family: How a network is called.
        network: The teacher, already loaded; all other roles start as its copies.
        specs: The roles besides the teacher.
        micro_batch_size: As in :class:`Roles`.
        copy_for: Makes the copy for a role, in float32; ``None`` to copy the network in memory.
    """

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        specs: tuple[RoleSpec, ...],
        micro_batch_size: int | None = None,
        copy_for: Callable[[RoleSpec], nn.Module] | None = None,
    ) -> None:
        super().__init__(family, specs, micro_batch_size)
        self.add_module(TEACHER, network.requires_grad_(False).eval())
        for spec in specs:
            # Trained roles carry gradient between updates too: DDP decides at the start
            # which parameters to synchronize.
            trained = spec.optimizer is not None
            if spec.head is not None:
                self.add_module(spec.name, FeatureHead(family.feature_width(network), spec.head))
            else:
                own = copy.deepcopy(network).float() if copy_for is None else copy_for(spec)
                self.add_module(spec.name, own.requires_grad_(trained))

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        return list(self.standalone(role).parameters())

    def names_of(self, role: str) -> list[str]:
        return [name for name in self.state_dict() if name.startswith(f"{role}.")]

    def is_frozen(self, name: str) -> bool:
        return name.startswith(f"{TEACHER}.")

    def standalone(self, role: str) -> nn.Module:
        network = self._modules[role]
        assert network is not None
        return network

    def write_adapter(self, role: str, directory: Path) -> nn.Module:
        raise UserError(
            "full weights were trained, so there is no adapter", where="export", remedy="use --form pipeline"
        )

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        self.standalone(target).load_state_dict(self.standalone(source).state_dict())

    @torch.no_grad()
    def _average(self, average: str, role: str, decay: float) -> None:
        get_ema_multi_avg_fn(decay)(self.parameters_of(average), self.parameters_of(role), 1)

    def checkpoint_activations(self) -> None:
        for role in set(self.trained) - set(self.heads):
            self.standalone(role).enable_gradient_checkpointing()  # type: ignore[operator]

    def networks(self, *, frozen: bool = False) -> list[nn.Module]:
        names = (TEACHER, *(spec.name for spec in self.specs if spec.head is None))
        return [self.standalone(name) for name in names if not (frozen and name in self.trained)]

    @contextmanager
    def _active(self, role: str, adapter_scale: float = 1.0) -> Iterator[nn.Module]:
        if adapter_scale != 1.0:
            raise UserError(
                f"adapter_scale is {adapter_scale}, but the roles are full copies",
                where="model.lora",
                remedy="set model.lora to train adapters",
            )
        yield self.standalone(role)

    def _set_training(self, role: str, mode: bool) -> None:
        self.standalone(role).train(mode)
