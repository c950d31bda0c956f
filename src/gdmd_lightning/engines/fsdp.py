"""Roles stepped under FSDP2: Lightning's steps, on networks that are built in shards."""

from __future__ import annotations

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from gdmd_lightning.engines.lightning import LightningEngine
from gdmd_lightning.engines.placement import Placement
from gdmd_lightning.errors import UserError
from gdmd_lightning.roles import AdapterRoles, Roles, RoleSpec
from gdmd_lightning.strategies.fully_sharded import FSDP2Strategy
from gdmd_lightning.strategies.sharding import whole_of


class FSDPEngine(LightningEngine):
    """The steps of one update under :class:`FSDP2Strategy`, with gradient norms over all ranks."""

    def _clip(self, role: str) -> Tensor:
        return whole_of(super()._clip(role))


class FSDPPlacement(Placement):
    """Under :class:`FSDP2Strategy`: all networks in shards, and adapters whole."""

    strategy: FSDP2Strategy

    def teacher(self) -> nn.Module:
        network = self.strategy.build(self.files.construct, list(self.files.weights), dtype=self.files.dtype)
        return network.requires_grad_(False).eval()

    def copy_for(self, spec: RoleSpec) -> nn.Module:
        return self.strategy.build(self.files.construct, list(self.files.weights), rounded=self.files.dtype).eval()

    def place(self, roles: Roles) -> None:
        """Put heads in shards, whose seeds give every rank the same values, and keep trained adapters whole.

        Adapters are small, and the network under them can have another precision, which a shard cannot mix.
        """
        for head in roles.heads:
            self.strategy.shard(roles.get_submodule(head).to(self.strategy.root_device))
        if isinstance(roles, AdapterRoles):
            for role in set(roles.trained) - set(roles.heads):
                self.strategy.keep_whole(roles.parameters_of(role))


def check_sharding(strategy: Strategy, specs: tuple[RoleSpec, ...]) -> None:
    """Fail before anything is loaded if a strategy of PyTorch's shards cannot train a role; others pass.

    Raises:
        UserError: If the strategy is Lightning's own, or an optimizer keeps its moments in a form that cannot be split.
    """
    check_kind(type(strategy))
    if not isinstance(strategy, FSDP2Strategy):
        return
    for spec in specs:
        if spec.optimizer is not None and spec.optimizer.algorithm != "adamw":
            raise UserError(
                f"the moments of {spec.optimizer.algorithm} cannot be split over ranks",
                where=f"model.{spec.name}.algorithm",
                remedy="use adamw with FSDP2",
            )


def check_kind(kind: type[Strategy]) -> None:
    """Fail if a strategy is one of Lightning's own that use PyTorch's shards.

    Raises:
        UserError: If it is.
    """
    if issubclass(kind, ModelParallelStrategy | FSDPStrategy) and not issubclass(kind, FSDP2Strategy):
        raise UserError(
            f"{kind.__name__} would not shard these networks, nor check checkpoints before loading them",
            where="trainer.strategy",
            remedy="use FSDP2Strategy, or --config fsdp2.yaml",
        )
