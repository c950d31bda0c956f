"""What one GPU holds in an update: what stays in memory, and the peak of each part of the update.

What an update needs in addition is found by following it (``following.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gdmd_lightning.engines.precision import full_name
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.starting import build_starts
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.planning.following import (
    LOWER,
    META,
    PlannedJudge,
    follow_update,
    frees_encoders,
    optimizer_of,
    parts_of,
    states_of,
)
from gdmd_lightning.planning.replay import NotRecorded
from gdmd_lightning.planning.sharding import Shape, Split, shapes_of
from gdmd_lightning.planning.strategy import ALONE, Strategy
from gdmd_lightning.roles import TEACHER, Roles

PLAIN = "32-true"


@dataclass(frozen=True)
class Component:
    """Something that stays in memory.

    Args:
        name: What it is.
        dtypes: Its precisions.
        numbers: How many numbers it holds.
        size: Bytes.
    """

    name: str
    dtypes: tuple[str, ...]
    numbers: int
    size: int


@dataclass(frozen=True)
class Plan:
    """Memory of one GPU.

    Args:
        components: What stays in memory.
        phases: What each part of an update needs in addition, in bytes, in the order in which the parts first occur;
            ``evaluation``, the last if there is one, is what the networks of an evaluation's scores take.
        host: What stays in the memory of the host for this GPU.
    """

    components: tuple[Component, ...]
    phases: dict[str, int]
    host: tuple[Component, ...] = ()

    @property
    def resident(self) -> int:
        """Bytes that stay in memory."""
        return sum(component.size for component in self.components)

    @property
    def total(self) -> int:
        """Peak bytes."""
        return self.resident + max(self.phases.values())


def plan(
    module: DistillationModule,
    batch_size: int,
    precision: str | int | None = PLAIN,
    strategy: Strategy = ALONE,
    *,
    whole: bool = False,
) -> Plan:
    """Follow one update of a run in progress and report what it holds.

    Args:
        module: A new one, before ``configure_model``; it cannot be used afterwards.
        batch_size: Samples per batch of the data module on one GPU.
        precision: Lightning's ``32-true``, ``bf16-mixed`` or ``16-mixed``, in any of its spellings.
        strategy: How roles are split over GPUs.
        whole: Follow all blocks of the networks, and not only one of several equal ones; the figures are the same.

    Raises:
        UserError: If the precision is another one, or the family or its configuration cannot be sketched.
    """
    precision = full_name(precision)
    if precision not in LOWER and precision != PLAIN:
        raise UserError(
            f"{precision!r} cannot be planned yet", where="trainer.precision", remedy=f"use {PLAIN}, {', '.join(LOWER)}"
        )
    if module.accumulate > 1:
        module.limit_micro_batches(batch_size)
    batch_size *= module.accumulate
    reward = _take_reward(module)
    module.updates = module.fullest_update
    module.build_roles(module.family.sketch())
    build_starts(module)
    module.to(META)
    if isinstance(module, MatchingModule):
        module.matching = replace(module.matching, fake_score_updates=1)  # the others are like it
    optimizers = {role: optimizer_of(module, role, strategy.split_of(role)) for role in module.roles.trained}
    held = sum(c.size for c in _components(module, optimizers, None, ALONE))

    def follow(samples: int) -> dict[str, int]:
        if not whole:
            try:
                return follow_update(module, optimizers, samples, precision, strategy, repeat=True)
            except NotRecorded:
                module.zero_grad()  # a rare graph, such as a gradient that reaches the first blocks only
        return follow_update(module, optimizers, samples, precision, strategy, repeat=False)

    phases = {
        name: max(round(size) - held, 0) for name, size in _peaks(follow, batch_size, module.micro_batch_size).items()
    }
    return Plan(tuple(_components(module, optimizers, reward, strategy)), phases, tuple(_on_host(module, strategy)))


def size_of_scores(scores: Iterable[TaskScore]) -> int:
    """Bytes of the networks of an evaluation's scores, which are on the GPU together while it runs."""
    return sum(_count("", _tensors(score.sketch())).size for score in scores)


def _peaks(follow: Callable[[int], dict[str, int]], batch_size: int, micro: int | None) -> dict[str, float]:
    """Peak bytes in each phase of an update.

    Of many micro-batches only two, and then three, are followed: each further one adds the same latents and text
    embeddings and nothing else.
    """
    if micro is None or batch_size <= 3 * micro:
        return {name: float(size) for name, size in follow(batch_size).items()}
    two, three = (follow(count * micro) for count in (2, 3))
    return {name: two[name] + (three[name] - two[name]) * (batch_size / micro - 2) for name in two}


def _take_reward(module: DistillationModule) -> nn.Module | None:
    """Shapes of the reward model; leaves the method a judge that needs no pixels."""
    if module.judge is None:
        return None
    reward = module.judge.reward.sketch()
    offloaded = _count("", _tensors(reward)).size if module.memory.reward == "offloaded" else 0
    module.judge = PlannedJudge(module.family, module.micro_batch_size, offloaded)
    return reward


def _components(
    module: DistillationModule,
    optimizers: dict[str, torch.optim.Optimizer],
    reward: nn.Module | None,
    strategy: Strategy,
) -> Iterator[Component]:
    roles = module.roles
    state = roles.state_dict(keep_vars=True)
    for name in (TEACHER, *(spec.name for spec in roles.specs)):
        tensors = [state[member] for member in roles.names_of(name)]
        yield from _nonempty(_weights(name, tensors, strategy.split_of(name)))
    yield from _nonempty(_count("merged adapters", (state[member] for member in roles.start_names())))
    for role in optimizers:
        split = strategy.split_of(role)
        if split.kind == "whole":
            yield _count(f"{role}: gradients", (p.grad for p in roles.parameters_of(role) if p.grad is not None))
        else:
            yield from _nonempty(_share(f"{role}: gradients", split, split.gradients(_shapes(roles, role))))
    for role, optimizer in optimizers.items():
        split = strategy.split_of(role)
        if split.kind == "whole":
            yield _count(f"{role}: optimizer states", states_of(optimizer))
        else:
            yield from _nonempty(_share(f"{role}: stepped weights", split, split.master(_shapes(roles, role))))
            yield from _nonempty(_share(f"{role}: optimizer states", split, split.moments(_shapes(roles, role))))
        if split.kind == "zero3":
            yield _of_float32(f"{role}: bucket of gradients", split.buckets())
    for name, part in parts_of(module).items():
        yield _count(name, _tensors(part))
    if frees_encoders(module):
        yield Component("text encoders (freed)", (), 0, 0)
    if reward is not None and module.memory.reward == "accelerator":
        yield _count("reward", _tensors(reward))
    if strategy.ddp:
        gradients = sum(p.numel() * p.element_size() for role in optimizers for p in roles.parameters_of(role))
        yield _of_float32("ddp: buckets of gradients", gradients)


def _on_host(module: DistillationModule, strategy: Strategy) -> Iterator[Component]:
    """What the strategy keeps in the memory of the host for one GPU."""
    for name in (TEACHER, *(spec.name for spec in module.roles.specs)):
        split = strategy.split_of(name)
        if split.offload_optimizer or split.offload_weights:
            yield _of_float32(f"{name} (1/{split.ranks})", split.on_host(_shapes(module.roles, name)))


def _shapes(roles: Roles, role: str) -> list[Shape]:
    parameters = roles.standalone(role).parameters() if role == TEACHER else roles.parameters_of(role)
    return shapes_of(parameters)


def _weights(name: str, tensors: list[Tensor], split: Split) -> Component:
    """A role's parameters and buffers on one GPU."""
    whole = _count(name, tensors)
    if split.kind == "whole":
        return whole
    parameters = [t for t in tensors if isinstance(t, nn.Parameter)]
    shapes = shapes_of(parameters)
    size = split.weights(shapes) + _count("", (t for t in tensors if not isinstance(t, nn.Parameter))).size
    if not split.weights_in_shards:
        return replace(whole, size=size)
    return Component(f"{name} (1/{split.ranks})", whole.dtypes, split.shard(shapes), size)


def _share(name: str, split: Split, size: int) -> Component:
    return _of_float32(f"{name} (1/{split.ranks})", size)


def _of_float32(name: str, size: int) -> Component:
    return Component(name, ("float32",), size // 4, size)


def _nonempty(component: Component) -> list[Component]:
    return [component] if component.size else []


def _tensors(network: nn.Module | None) -> Iterator[Tensor]:
    if network is not None:
        yield from network.parameters()
        yield from network.buffers()


def _count(name: str, tensors: Iterable[Tensor]) -> Component:
    found = {id(tensor): tensor for tensor in tensors if tensor.device.type == "meta"}.values()
    dtypes = tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in found if tensor.dim()}))
    numbers = sum(tensor.numel() for tensor in found)
    return Component(name, dtypes, numbers, sum(math.prod(t.shape) * t.element_size() for t in found))
