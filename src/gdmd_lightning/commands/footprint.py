"""What a method's update holds in memory, followed on the meta device: the update is the real one, its numbers are not.

Everything but the batch is the same on every GPU of a data-parallel run; sharding is not followed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import Conditioning
from gdmd_lightning.memory_trace import Autocast, FusedAttention, Trace
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.roles import Trainable

META = torch.device("meta")
LOWER = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
PLAIN = ("32", "32-true", None)


@dataclass(frozen=True)
class Component:
    """Something that is in memory all the time.

    Args:
        name: What it is.
        dtypes: Its precisions.
        numbers: How many numbers it has.
        size: Its bytes.
    """

    name: str
    dtypes: tuple[str, ...]
    numbers: int
    size: int


@dataclass(frozen=True)
class Plan:
    """Memory of one GPU.

    Args:
        components: What is there all the time.
        phases: What each part of an update needs beside them, in bytes, in its order.
    """

    components: tuple[Component, ...]
    phases: dict[str, int]

    @property
    def resident(self) -> int:
        """Bytes that are there all the time."""
        return sum(component.size for component in self.components)

    @property
    def total(self) -> int:
        """Most bytes at any time."""
        return self.resident + max(self.phases.values())


class _Silent(Reward):
    """A judge that knows no pictures, for pictures that are none."""

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.zeros(len(images))


def plan(
    module: DistillationModule,
    batch_size: int,
    group_size: int = 1,
    precision: str | None = "32-true",
    accelerator: Literal["cuda", "cpu"] = "cuda",
) -> Plan:
    """Follow an update of a method, of a run that is under way, and say what it holds.

    Args:
        module: A fresh one, before ``configure_model``; it is of no use afterwards.
        batch_size: Samples of an update on one GPU.
        group_size: Samples of a prompt.
        precision: Lightning's: ``32-true``, ``bf16-mixed`` or ``16-mixed``.
        accelerator: ``cuda`` steps an optimizer on all parameters at once, ``cpu`` on one after another.

    Raises:
        UserError: If the precision is another, or the family or its configuration cannot be sketched.
    """
    if precision not in LOWER and precision not in PLAIN:
        raise UserError(
            f"{precision!r} cannot be planned yet", where="trainer.precision", remedy=f"use 32-true, {', '.join(LOWER)}"
        )
    reward = _take_reward(module)
    _cast_on_meta(module)
    module.to(META)
    for part in module.modules():
        if isinstance(part, AveragedModel):  # its counter is asked for its value
            part.n_averaged = torch.ones((), dtype=torch.long)
    module.matching = replace(module.matching, critic_updates=1)  # the others are like it
    optimizers = {role: _optimizer(module, role, accelerator) for role in module.optimization}

    trace = Trace()
    trace.hold(module)
    for optimizer in optimizers.values():
        trace.see(_states(optimizer))
    for part in _parts(module).values():
        trace.hold(part)
    row = module.family.blank_conditioning(META)
    batch = PromptBatch((Prompt(""),) * batch_size, group_size)
    with ExitStack() as modes:
        modes.enter_context(FusedAttention())
        if precision in LOWER:
            modes.enter_context(Autocast(LOWER[precision]))
        modes.enter_context(trace)
        modes.enter_context(_phases_of(module, trace))
        _update(module, batch, row, optimizers, trace)
    components = tuple(_components(module, optimizers, reward))
    held = sum(c.size for c in components if c.name != "reward")
    phases = {name: max(trace.phases[name] - held, 0) for name in _PHASES if name in trace.phases}
    if module.memory.reward == "offloaded" and "decoding" in phases:
        phases["decoding"] += _count("", _tensors(reward)).size
    return Plan(components, phases)


_PHASES = (
    *("rollout", "targets", "decoding", "generator forward", "generator backward"),
    *("critic forward", "critic backward", "optimizer step"),
)
_SHORT = {"generator": "generator", "fake_score": "critic"}


def _take_reward(module: DistillationModule) -> nn.Module | None:
    """The reward's shapes, leaving the method one that can judge pictures without pixels."""
    reward = getattr(module, "reward", None)
    if not isinstance(reward, Reward):
        return None
    module.reward = _Silent()  # type: ignore[assignment]
    return reward.sketch()


def _cast_on_meta(module: DistillationModule) -> None:
    """Give the sketch its roles."""
    network, family = module.family.sketch(), module.family
    family.latent_shape(module.height, module.width)
    sigmas = family.few_step_sigmas(module.sampler.steps)  # real ones: they are compared with each other
    family.few_step_sigmas = lambda steps: sigmas  # type: ignore[method-assign]
    try:
        module.cast_roles(network)
    finally:
        del family.few_step_sigmas  # type: ignore[method-assign]


def _parts(module: DistillationModule) -> dict[str, nn.Module]:
    """Autoencoder and text encoders, unless they are freed, by their names in the pipeline."""
    own = {id(part) for part in module.networks.modules()}
    components = module.family.loaded.components.items()
    parts = {name: part for name, part in components if isinstance(part, nn.Module) and id(part) not in own}
    if _frees_encoders(module):
        return {name: part for name, part in parts.items() if not name.startswith("text_encoder")}
    return parts


def _frees_encoders(module: DistillationModule) -> bool:
    return module.embedding_cache is not None and module.embedding_cache.free_encoders


def _optimizer(module: DistillationModule, role: Trainable, accelerator: str) -> torch.optim.Optimizer:
    """The role's optimizer as an update before has left it: with states, and gradients not yet dropped."""
    parameters, settings = module.networks.parameters_of(role), module.optimization[role]
    optimizer = EightBit(parameters) if settings.algorithm == "adamw_8bit" else settings.over(parameters)
    for group in optimizer.param_groups:
        group["foreach"] = accelerator == "cuda"
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    return optimizer


class EightBit(torch.optim.Optimizer):
    """The size of bitsandbytes' 8-bit Adam, which has no meta device: a byte a moment and a scale for each 256.

    Parameters of fewer than 4,096 numbers keep their moments in float32, as there.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make the states, the first time."""
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


def _update(
    module: DistillationModule,
    batch: PromptBatch,
    row: Conditioning,
    optimizers: dict[Trainable, torch.optim.Optimizer],
    trace: Trace,
) -> None:
    """One update as Lightning would drive it."""

    def learn(role: Trainable, loss: Tensor) -> None:
        optimizers[role].zero_grad(set_to_none=True)
        with trace.phase(f"{_SHORT[role]} backward"):
            # Not loss.backward(): a mode that sees it called is off inside, where checkpointed blocks run again.
            torch.autograd.backward(get_gradient_edge(loss), torch.ones_like(loss))
        with trace.phase("optimizer step"):
            clip_grad_norm_(module.networks.parameters_of(role), module.optimization[role].gradient_clip)
            optimizers[role].step()

    conditioning = Conditioning.concat([row] * len(batch))
    module.one_update(batch, conditioning, learn)
    module.networks.after_generator_update()


@contextmanager
def _phases_of(module: DistillationModule, trace: Trace) -> Iterator[None]:
    """Inside, the named parts of a method's losses are phases of the trace."""

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with trace.phase(name):
                return function(*args, **kwargs)

        return call

    watch: list[tuple[Any, str, str]] = [
        (module, "rollout_state", "rollout"),
        (module, "implicit_targets", "targets"),
        (module.family, "decode", "decoding"),
        (module, "generator_loss", "generator forward"),
        (module, "critic_loss", "critic forward"),
    ]
    for owner, attribute, name in watch:
        setattr(owner, attribute, watched(name, getattr(owner, attribute)))
    try:
        yield
    finally:
        for owner, attribute, _ in watch:
            delattr(owner, attribute)


def _components(
    module: DistillationModule,
    optimizers: dict[Trainable, torch.optim.Optimizer],
    reward: nn.Module | None,
) -> Iterator[Component]:
    roles = module.networks
    state = roles.state_dict(keep_vars=True)
    named: dict[str, set[str]] = {"teacher": {name for name in state if roles.is_teachers(name)}}
    named |= {role: set(roles.names_of(role)) for role in ("generator", "fake_score", "ema", "old")}  # type: ignore[arg-type]
    named["snapshots"] = state.keys() - set().union(*named.values())
    for name, members in named.items():
        yield from _nonempty(_count(name, (state[member] for member in members)))
    for role in optimizers:
        grads = (p.grad for p in roles.parameters_of(role) if p.grad is not None)
        yield _count(f"{role}: gradients", grads)
    for role, optimizer in optimizers.items():
        yield _count(f"{role}: optimizer states", _states(optimizer))
    for name, part in _parts(module).items():
        yield _count(name, _tensors(part))
    if _frees_encoders(module):
        yield Component("text encoders (freed)", (), 0, 0)
    if reward is not None and module.memory.reward == "accelerator":
        yield _count("reward", _tensors(reward))


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
