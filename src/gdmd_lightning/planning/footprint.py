"""What one update of a method holds in memory, followed on the meta device with real code and without numbers.

Activations are the same under every strategy, and are followed. What a strategy splits, and what it gathers for the
moment, is arithmetic (``sharding.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import clip_grad_norm_

from gdmd_lightning.engines.base import Engine
from gdmd_lightning.engines.precision import full_name
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, Conditioning
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.starting import build_starts
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.phases import listening, phase
from gdmd_lightning.planning.replay import NotRecorded, Replay, drop_gradient
from gdmd_lightning.planning.sharding import Shape, Split, shapes_of
from gdmd_lightning.planning.strategy import ALONE, Strategy
from gdmd_lightning.planning.trace import Autocast, FusedAttention, Trace
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import TEACHER, AdapterRoles, Roles

META = torch.device("meta")
LOWER = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
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


class _Unasked(Reward):
    """Accepts all prompts and is never asked for a score."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise AssertionError("a planned judge asks no reward")


class _PlannedJudge(Judge):
    """Decodes, and stands in for a reward, which cannot score images without pixels.

    Args:
        family: Decodes latents.
        micro_batch_size: Maximum number of images decoded at once.
        offloaded: Bytes of a reward that is on the device only while it scores; 0 for one that stays where it is.

    Attributes:
        trace: Counts these bytes, for as long as they are on the device.
    """

    trace: Trace

    def __init__(self, family: ModelFamily, micro_batch_size: int | None, offloaded: int) -> None:
        super().__init__(_Unasked(), family, "cpu", micro_batch_size)
        self.offloaded = offloaded

    @contextmanager
    def ahead(self, latents: Tensor, prompts: Sequence[Prompt]) -> Iterator[Callable[[], Tensor]]:
        self.trace.add(self.offloaded)  # it may score one micro-batch while the next one is decoded
        with super().ahead(latents, prompts) as answer:

            def last() -> Tensor:
                scores = answer()
                self.trace.add(-self.offloaded)
                return scores

            yield last

    def _score(self, latents: Tensor, prompts: Sequence[Prompt], rewards: Sequence[Reward]) -> Tensor:
        self.trace.add(self.offloaded)
        with phase("decoding"):
            scores = self.family.decode(latents).flatten(1).mean(1, keepdim=True).expand(-1, len(rewards))
        self.trace.add(-self.offloaded)
        return scores

    def _ask(self, images: Tensor, latents: Tensor, prompts: Sequence[Prompt], rewards: Sequence[Reward]) -> Tensor:
        # Of images that are scored meanwhile: a view, so that they stay in memory until the answer is taken.
        return images.flatten(1)[:, :1].expand(-1, len(rewards))


class _TracedEngine(Engine):
    """Steps roles on the meta device; what a step of split weights takes is known without following it."""

    def __init__(
        self, roles: Roles, optimizers: dict[str, torch.optim.Optimizer], strategy: Strategy, trace: Trace
    ) -> None:
        super().__init__(roles)
        self.optimizers, self.strategy, self.trace = optimizers, strategy, trace
        self._role = ""
        self._missing = 0  # bytes of the gradients in shards that the role at work has not computed yet

    def zero_grad(self, role: str) -> None:
        self._role = role
        self.optimizers[role].zero_grad(set_to_none=True)
        split, shapes = self.strategy.split_of(role), shapes_of(self.roles.parameters_of(role))
        self._missing = split.reduced(shapes)
        if split.kind == "fsdp2":
            self._missing = split.gradients(shapes)
            self.trace.add(-self._missing)

    def backward(self, loss: Tensor) -> None:
        split = self.strategy.split_of(self._role)
        moment = self._gathered() + (split.buckets() if split.kind in ("zero1", "zero2") else 0)
        self.trace.add(moment)
        # Not loss.backward(): a torch function mode that sees it called is off inside, where blocks are recomputed.
        torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
        self.trace.add(self._missing - moment)
        self._missing = 0

    def _gathered(self) -> int:
        """Bytes that are whole for the moment in a backward pass; adapters are on the teacher's network."""
        adapters = isinstance(self.roles, AdapterRoles)
        network = TEACHER if adapters else self._role
        split = self.strategy.split_of(network)
        return split.gathered(_network_of(self.roles, network), learned=not adapters)

    def step(self, role: str) -> bool:
        split = self.strategy.split_of(role)
        if split.kind != "whole":
            shapes = shapes_of(self.roles.parameters_of(role))
            self.trace.bump(split.stepping(shapes))
            self.optimizers[role].zero_grad(set_to_none=True)
            self.trace.add(-split.reduced(shapes))
            return True
        clip_grad_norm_(self.roles.parameters_of(role), self.roles.optimization_of(role).gradient_clip)
        self.optimizers[role].step()
        return True


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
    optimizers = {role: _optimizer(module, role, strategy.split_of(role)) for role in module.roles.trained}
    held = sum(c.size for c in _components(module, optimizers, None, ALONE))

    def follow(samples: int) -> dict[str, int]:
        if not whole:
            try:
                return _follow(module, optimizers, samples, precision, strategy, repeat=True)
            except NotRecorded:
                module.zero_grad()  # a rare graph, such as a gradient that reaches the first blocks only
        return _follow(module, optimizers, samples, precision, strategy, repeat=False)

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


def _follow(
    module: DistillationModule,
    optimizers: dict[str, torch.optim.Optimizer],
    batch_size: int,
    precision: str,
    strategy: Strategy,
    *,
    repeat: bool,
) -> dict[str, int]:
    """Peak bytes in each phase of an update of ``batch_size`` samples; ``repeat`` follows equal blocks once."""
    trace = Trace()
    if isinstance(module.judge, _PlannedJudge):
        module.judge.trace = trace
    trace.hold(module)
    for optimizer in optimizers.values():
        trace.see(_states(optimizer))
    for part in _parts(module).values():
        trace.hold(part)
    prompts = PromptBatch((Prompt(""),) * batch_size, 1)
    row = module.family.blank_conditioning(META)
    with ExitStack() as modes:
        modes.enter_context(FusedAttention())
        if precision in LOWER:
            modes.enter_context(Autocast(LOWER[precision]))
        modes.enter_context(trace)
        modes.enter_context(listening(trace.phase))
        modes.enter_context(_gathering(module.roles, strategy, trace))
        if repeat:
            modes.enter_context(Replay(trace, precision).of(_networks(module)))
        real_x0 = module.real_x0(prompts.prompts)
        batch = Batch(prompts.prompts, prompts.groups, Conditioning.concat([row] * batch_size), real_x0)
        module.update(batch, _TracedEngine(module.roles, optimizers, strategy, trace))
    return trace.phases


def _take_reward(module: DistillationModule) -> nn.Module | None:
    """Shapes of the reward model; leaves the method a judge that needs no pixels."""
    if module.judge is None:
        return None
    reward = module.judge.reward.sketch()
    offloaded = _count("", _tensors(reward)).size if module.memory.reward == "offloaded" else 0
    module.judge = _PlannedJudge(module.family, module.micro_batch_size, offloaded)
    return reward


def _parts(module: DistillationModule) -> dict[str, nn.Module]:
    """Autoencoder and text encoders by their names in the pipeline, without freed ones."""
    own = {id(part) for part in module.roles.modules()}
    components = module.family.loaded.components.items()
    parts = {name: part for name, part in components if isinstance(part, nn.Module) and id(part) not in own}
    if _frees_encoders(module):
        return {name: part for name, part in parts.items() if not name.startswith("text_encoder")}
    return parts


def _networks(module: DistillationModule) -> list[nn.Module]:
    """What an update calls."""
    return [module.roles, *_parts(module).values()]


def _frees_encoders(module: DistillationModule) -> bool:
    return module.embedding_cache is not None and module.embedding_cache.free_encoders


def _optimizer(module: DistillationModule, role: str, split: Split) -> torch.optim.Optimizer:
    """The role's optimizer as the previous update left it: with states, and with gradients that are not split."""
    parameters, settings = module.roles.parameters_of(role), module.roles.optimization_of(role)
    optimizer = (EightBit if settings.algorithm == "adamw_8bit" else Fused)(parameters)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    if split.kind != "whole":
        optimizer.zero_grad()
    if split.drops_gradients:
        for parameter in parameters:
            drop_gradient(parameter)
    return optimizer


class Fused(torch.optim.Optimizer):
    """Moments of torch's fused AdamW, which does not run on the meta device; its steps need nothing in addition."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Create the states, the first time."""
        for parameter in (p for group in self.param_groups for p in group["params"] if not self.state[p]):
            self.state[parameter] = {name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")}


class EightBit(torch.optim.Optimizer):
    """States of the size of bitsandbytes' 8-bit Adam, which does not run on the meta device.

    One byte per moment and a scale per 256 of them; parameters with fewer than 4,096 numbers keep float32 moments.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Create the states, the first time."""
        for parameter in (p for group in self.param_groups for p in group["params"] if not self.state[p]):
            small = parameter.numel() < 4096
            moment = torch.float32 if small else torch.uint8
            for name in ("exp_avg", "exp_avg_sq"):
                self.state[parameter][name] = torch.empty_like(parameter, dtype=moment)
                if not small:
                    scales = math.ceil(parameter.numel() / 256)
                    self.state[parameter][f"{name}_scales"] = torch.empty(scales, device=parameter.device)


def _states(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for each in optimizer.state.values():
        yield from (value for value in each.values() if isinstance(value, Tensor))


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
            yield _count(f"{role}: optimizer states", _states(optimizer))
        else:
            yield from _nonempty(_share(f"{role}: stepped weights", split, split.master(_shapes(roles, role))))
            yield from _nonempty(_share(f"{role}: optimizer states", split, split.moments(_shapes(roles, role))))
        if split.kind == "zero3":
            yield _of_float32(f"{role}: bucket of gradients", split.buckets())
    for name, part in _parts(module).items():
        yield _count(name, _tensors(part))
    if _frees_encoders(module):
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


@contextmanager
def _gathering(roles: Roles, strategy: Strategy, trace: Trace) -> Iterator[None]:
    """Inside, the weights in shards of a network that is evaluated are whole for the moment."""
    handles = []
    for name, split in strategy.splits.items():
        network = _network_of(roles, name)
        size = split.gathered(network, learned=False)
        if size:
            handles.append(network.register_forward_pre_hook(lambda *_, size=size: trace.add(size)))
            handles.append(network.register_forward_hook(lambda *_, size=size: trace.add(-size)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _network_of(roles: Roles, role: str) -> nn.Module:
    """What is called when a role is evaluated."""
    if isinstance(roles, AdapterRoles):
        network: nn.Module = roles.get_submodule(role) if role in roles.heads else roles.network
        return network
    return roles.standalone(role)


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
