"""Roles as full copies of which some are in shards, each rank holding a range of every weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim.swa_utils import get_ema_multi_avg_fn

from gdmd_lightning.latents import NoisyLatents
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
        found, network = super().features(role, latents, through=through), self.standalone(role)
        if isinstance(network, FSDPModule) and found.requires_grad:

            def gather(_: Tensor) -> None:
                # FSDP2 gathers what is outside of blocks when the backward enters by the network's output. That of
                # features does not.
                network.unshard()

            found.register_hook(gather)
        return found

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
        return self._lockstep(network) if _in_shards(network) else nullcontext()

    @contextmanager
    def _lockstep(self, network: nn.Module) -> Iterator[None]:
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
            self._evaluate_for_others(network, device)

    @torch.no_grad()
    def _evaluate_for_others(self, network: nn.Module, device: torch.device) -> None:
        x, sigma = torch.zeros(1, *self.latent_shape, device=device), torch.full((1,), 0.5, device=device)
        self.family.predict_velocity(network, x, sigma, self.family.empty.to(device))


def _in_shards(network: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in network.parameters())


def _shards(network: nn.Module) -> list[Tensor]:
    return [shard_of(parameter) for parameter in network.parameters()]
