"""Where the networks of a module are if its strategy splits them over ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import nn

from gdmd_lightning.families.fingerprint import fingerprint
from gdmd_lightning.families.loading import NetworkFiles
from gdmd_lightning.roles import Roles, RoleSpec
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy


class Placement(ABC):
    """Builds the networks of a module in shards: the teacher first, then the copies of it.

    Args:
        strategy: The trainer's.
    """

    def __init__(self, strategy: MultiEngineDeepSpeedStrategy | FSDP2Strategy) -> None:
        self.strategy = strategy
        self._files: NetworkFiles | None = None

    @property
    def files(self) -> NetworkFiles:
        """The teacher's files, after :meth:`build_teacher`."""
        assert self._files is not None
        return self._files

    def build_teacher(self, files: NetworkFiles) -> nn.Module:
        """The teacher from its files, in shards from construction on."""
        self._files = files
        return self.teacher()

    @abstractmethod
    def teacher(self) -> nn.Module:
        """The frozen network of the files."""

    @abstractmethod
    def copy_for(self, spec: RoleSpec) -> nn.Module:
        """A role's own copy of the teacher in float32, rounded to the teacher's precision as a copy of it would be."""

    def place(self, roles: Roles) -> None:
        """Put what is trained besides such copies where the strategy wants it; by default it stays where it is."""

    def fingerprint(self, network: nn.Module) -> str:
        """That of the whole network, as if it were on one rank."""
        return fingerprint(self.strategy.full_weights(network))
