"""One update of a method, followed on the meta device with its own code and without numbers.

Activations are the same under every strategy, and are followed. What a strategy splits, and what it gathers for the
moment, is arithmetic (``sharding.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import clip_grad_norm_

from gdmd_lightning.engines.base import Engine
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, Conditioning
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.phases import listening, phase
from gdmd_lightning.planning.replay import Replay, drop_gradient
from gdmd_lightning.planning.sharding import Split, shapes_of
from gdmd_lightning.planning.strategy import Strategy
from gdmd_lightning.planning.trace import Autocast, FusedAttention, Trace
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import TEACHER, AdapterRoles, Roles

META = torch.device("meta")
LOWER = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


class _Unasked(Reward):
    """Accepts all prompts and is never asked for a score."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise AssertionError("a planned judge asks no reward")


class PlannedJudge(Judge):
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


def follow_update(
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
    if isinstance(module.judge, PlannedJudge):
        module.judge.trace = trace
    trace.hold(module)
    for optimizer in optimizers.values():
        trace.see(states_of(optimizer))
    for part in parts_of(module).values():
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


def _networks(module: DistillationModule) -> list[nn.Module]:
    """What an update calls."""
    return [module.roles, *parts_of(module).values()]


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


def parts_of(module: DistillationModule) -> dict[str, nn.Module]:
    """Autoencoder and text encoders by their names in the pipeline, without freed ones."""
    own = {id(part) for part in module.roles.modules()}
    components = module.family.loaded.components.items()
    parts = {name: part for name, part in components if isinstance(part, nn.Module) and id(part) not in own}
    if frees_encoders(module):
        return {name: part for name, part in parts.items() if not name.startswith("text_encoder")}
    return parts


def frees_encoders(module: DistillationModule) -> bool:
    """Whether text encoders leave the GPU before the training."""
    return module.embedding_cache is not None and module.embedding_cache.free_encoders


def optimizer_of(module: DistillationModule, role: str, split: Split) -> torch.optim.Optimizer:
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


def states_of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Tensors of an optimizer's states."""
    for each in optimizer.state.values():
        yield from (value for value in each.values() if isinstance(value, Tensor))
