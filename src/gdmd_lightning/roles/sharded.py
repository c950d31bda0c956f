"""Roles whose networks are in shards, each rank holding a range of every weight: copies, or adapters on one base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.roles.adapters import AdapterRoles
from gdmd_lightning.roles.copies import CopiedRoles
from gdmd_lightning.strategies.partitions import forget_gathered, is_sharded, shape_of, shard_of
from gdmd_lightning.strategies.sharding import fill


class ShardedRoles(CopiedRoles):
    """Full copies, of which some are in shards.

    An average or snapshot is in shards exactly if the role that it follows is, so that both have the same ranges on
    each rank, and following needs no communication.
    """

    latent_shape: tuple[int, int, int]
    """``(C, H, W)``, for evaluations that only keep other ranks company; set by the module."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        found = super().shapes()
        return found | {name: tuple(shape_of(parameter)) for name, parameter in self.named_parameters()}

    def fill(self, role: str, weights: Mapping[str, Tensor]) -> None:
        fill(self.standalone(role), {name.removeprefix(f"{role}."): value for name, value in weights.items()})

    def features(self, role: str, latents: NoisyLatents, *, through: bool = False) -> Tensor:
        return _gathering(super().features(role, latents, through=through), self.standalone(role))

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        theirs, mine = self.standalone(source), self.standalone(target)
        if not _in_shards(mine):
            return super().copy(source, target)
        for own, other in zip(_shards(mine), _shards(theirs), strict=True):
            own.copy_(other)
        for buffer, other in zip(mine.buffers(), theirs.buffers(), strict=True):
            buffer.copy_(other)
        forget_gathered(mine)

    @torch.no_grad()
    def _average(self, average: str, role: str, decay: float) -> None:
        mine = self.standalone(average)
        if not _in_shards(mine):
            return super()._average(average, role, decay)
        get_ema_multi_avg_fn(decay)(_shards(mine), _shards(self.standalone(role)), 1)
        forget_gathered(mine)

    def lockstep(self, role: str) -> AbstractContextManager[None]:
        network = self.standalone(role)
        return _lockstep(network, self.family, self.latent_shape) if _in_shards(network) else nullcontext()


class ShardedAdapterRoles(AdapterRoles):
    """Adapters, whole on every rank, on a network in shards (FSDP2)."""

    latent_shape: tuple[int, int, int]
    """As in :class:`ShardedRoles`."""

    def features(self, role: str, latents: NoisyLatents, *, through: bool = False) -> Tensor:
        return _gathering(super().features(role, latents, through=through), self.network)

    def lockstep(self, role: str) -> AbstractContextManager[None]:
        return _lockstep(self.network, self.family, self.latent_shape)


def _gathering(features: Tensor, network: nn.Module) -> Tensor:
    """Features whose backward gathers what FSDP2 gathers when a backward enters by the network's output.

    That is what is outside of blocks; a backward from features enters elsewhere.
    """
    if isinstance(network, FSDPModule) and features.requires_grad:

        def gather(_: Tensor) -> None:
            network.unshard()

        features.register_hook(gather)
    return features


@contextmanager
def _lockstep(network: nn.Module, family: ModelFamily, latent_shape: tuple[int, int, int]) -> Iterator[None]:
    """Gathering weights takes all ranks: a rank that is done goes on with evaluations of no consequence.

    Before each evaluation all ranks exchange one number, whether anybody still has work.
    """
    device = next(network.parameters()).device

    def anybody(working: bool) -> Tensor:
        flag = torch.tensor(float(working), device=device)
        distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
        return flag

    hook = network.register_forward_pre_hook(lambda *_: (anybody(True), None)[1], prepend=True)
    try:
        yield
    finally:
        hook.remove()
    while bool(anybody(False)):
        with torch.no_grad():
            x, sigma = torch.zeros(1, *latent_shape, device=device), torch.full((1,), 0.5, device=device)
            family.predict_velocity(network, x, sigma, family.empty.to(device))


def _in_shards(network: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in network.parameters())


def _shards(network: nn.Module) -> list[Tensor]:
    return [shard_of(parameter) for parameter in network.parameters()]
