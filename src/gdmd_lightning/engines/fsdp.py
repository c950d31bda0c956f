"""Roles stepped under FSDP2: Lightning's steps, on networks that are built in shards."""

from __future__ import annotations

from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn

from gdmd_lightning.engines.lightning import LightningEngine
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.fingerprint import fingerprint
from gdmd_lightning.families.loading import NetworkFiles
from gdmd_lightning.roles import AdapterRoles, Roles, RoleSpec
from gdmd_lightning.strategies.fully_sharded import FSDP2Strategy
from gdmd_lightning.strategies.sharding import whole_of


class FSDPEngine(LightningEngine):
    """The steps of one update under :class:`FSDP2Strategy`, with gradient norms over all ranks."""

    def _clip(self, role: str) -> Tensor:
        return whole_of(super()._clip(role))


class FSDPPlacement:
    """Where the networks of a module are under :class:`FSDP2Strategy`: all in shards, and adapters whole.

    Args:
        strategy: The strategy.

    Attributes:
        files: The teacher's files, after :meth:`build_teacher`.
    """

    def __init__(self, strategy: FSDP2Strategy) -> None:
        self.strategy = strategy
        self.files: NetworkFiles | None = None

    def build_teacher(self, files: NetworkFiles) -> nn.Module:
        """The teacher from its files, in shards from construction on."""
        self.files = files
        network = self.strategy.build(files.construct, list(files.weights), dtype=files.dtype)
        return network.requires_grad_(False).eval()

    def copy_for(self, spec: RoleSpec) -> nn.Module:
        """A role's own copy of the teacher in float32, in shards."""
        assert self.files is not None
        # As a copy of the teacher would be: rounded to its precision.
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

    def fingerprint(self, network: nn.Module) -> str:
        """That of the whole network, as if it were on one rank."""
        return fingerprint(self.strategy.full_weights(network))


def check_sharding(strategy: Strategy, specs: tuple[RoleSpec, ...]) -> None:
    """Fail before anything is loaded if a strategy of PyTorch's shards cannot train a role; others pass.

    Raises:
        UserError: If the strategy is Lightning's own, or an optimizer keeps its moments in a form that cannot be split.
    """
    if not isinstance(strategy, FSDP2Strategy):
        if isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
            raise UserError(
                f"{type(strategy).__name__} would not shard these networks, nor check checkpoints before loading them",
                where="trainer.strategy",
                remedy="use FSDP2Strategy, or --config fsdp2.yaml",
            )
        return
    for spec in specs:
        if spec.optimizer is not None and spec.optimizer.algorithm != "adamw":
            raise UserError(
                f"the moments of {spec.optimizer.algorithm} cannot be split over ranks",
                where=f"model.{spec.name}.algorithm",
                remedy="use adamw with FSDP2",
            )
