"""Equal blocks of a network, of which a trace follows one; the others repeat what it did to memory.

A call of a block is known by the block's structure and by the shapes of what it gets. Followed once, it tells how much
it holds at most, what it returns, what it keeps for its backward pass, and how much that pass holds at most.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from gdmd_lightning.planning.trace import NotRepeatable, Trace, Watch, signature

SMALLEST = 5
"""Submodules that a block has at least; following smaller ones costs no more than repeating them."""


DROPS = "drops_gradient"
"""Attribute of parameters whose gradient is dropped when it is known."""


def drop_gradient(parameter: nn.Parameter) -> None:
    """Let a parameter drop its gradient as soon as it is known, as a strategy does that reduces it to a shard."""
    setattr(parameter, DROPS, True)

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(drop)


class NotRecorded(Exception):
    """A backward pass met a repeated block before one that was followed."""


@dataclass
class _Known:
    """What a call did when it was followed.

    Args:
        outputs: Size, stride, dtype of each output and whether it carries gradient; other outputs as they are.
        spec: How the outputs are nested.
        peak: Most bytes in addition to those alive before the call.
        kept: Bytes of new tensors that its graph keeps.
        keeps: Which of its inputs the graph keeps.
        backward: Most bytes in addition in the backward pass, and which inputs get a gradient; by which
            parameters had a gradient before.
    """

    outputs: list[Any]
    spec: TreeSpec
    peak: int
    kept: int = 0
    keeps: tuple[bool, ...] = ()
    backward: dict[Any, tuple[int, tuple[bool, ...]]] = field(default_factory=dict)


class Replay:
    """Follows calls of blocks, and repeats those that are known.

    Args:
        trace: Counts bytes.
        modes: What else decides what a call does, such as the precision of autocast.
    """

    _known: ClassVar[dict[Any, _Known | None]] = {}  # for all plans of a process
    _structures: ClassVar[dict[Any, int]] = {}

    def __init__(self, trace: Trace, modes: Any = None) -> None:
        self.trace, self.modes = trace, modes
        self._blocks: dict[int, _Block] = {}
        self._checkpointing = False
        self._gradients = _Gradients()

    @contextmanager
    def of(self, networks: Iterable[nn.Module]) -> Iterator[None]:
        """Inside, equal blocks of these networks are followed once."""
        undo: list[tuple[nn.Module, str, Any]] = []
        for network in networks:
            for block in self._equal_blocks(network):
                self._blocks[id(block.module)] = block
                undo.append((block.module, "forward", block.module.__dict__.get("forward")))
                block.module.forward = self._instead(block, block.module.forward)
            for module in network.modules():
                if getattr(module, "gradient_checkpointing", False) is True:
                    checkpoint: Any = module._gradient_checkpointing_func
                    undo.append((module, "_gradient_checkpointing_func", checkpoint))
                    setattr(module, "_gradient_checkpointing_func", self._instead_of_checkpoint(checkpoint))  # noqa: B010
        try:
            yield
        finally:
            for module, name, before in reversed(undo):
                if before is None:
                    delattr(module, name)
                else:
                    setattr(module, name, before)

    def _equal_blocks(self, network: nn.Module) -> list[_Block]:
        """Members of lists of modules that occur more than once."""
        found: list[_Block] = []
        for members in (m for m in network.modules() if isinstance(m, nn.ModuleList)):
            large = [m for m in members if m is not None and _size(m) > SMALLEST]
            structures = [self._structure(m) for m in large]
            for module, structure, following in zip(large, structures, [*structures[1:], None], strict=False):
                found.append(_Block(module, structure, last=following != structure))
        often = Counter(block.structure for block in found)
        return [block for block in found if often[block.structure] > 1]

    def _structure(self, module: nn.Module) -> int:
        described = tuple(
            (name, type(part), _plain(part), tuple((k, b.shape, b.dtype) for k, b in part.named_buffers(recurse=False)))
            for name, part in module.named_modules()
        )
        parameters = tuple((name, p.shape, p.dtype) for name, p in module.named_parameters())
        return self._structures.setdefault((described, parameters), len(self._structures))

    def _instead(self, block: _Block, forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self._checkpointing or torch._C._current_graph_task_id() != -1:
                return forward(*args, **kwargs)
            return self._call(block, "plain", forward, args, kwargs)

        return call

    def _instead_of_checkpoint(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            block = self._blocks.get(id(function))

            def whole(*args: Any, **kwargs: Any) -> Any:
                self._checkpointing = True
                try:
                    return checkpoint(function, *args, **kwargs)
                finally:
                    self._checkpointing = False

            return whole(*args, **kwargs) if block is None else self._call(block, "checkpointed", whole, args, kwargs)

        return call

    def _call(self, block: _Block, kind: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inputs, spec = tree_flatten((args, kwargs))
        gradient = torch.is_grad_enabled()
        with torch._C.DisableTorchFunction():  # else every attribute of a parameter that is read here passes all modes
            learned = block.learned() if gradient else []
            through = gradient and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
            try:
                key = (kind, gradient, self.modes, block.key(), str(spec), signature(inputs), _flags(inputs, gradient))
            except NotRepeatable:
                key = None
        if key is None:
            return run(*args, **kwargs)
        known = self._known.get(key, _NOT_KNOWN)
        if known is None or (learned and not through):
            return run(*args, **kwargs)
        # The last block is the first of a backward pass, and tells what that of the others does.
        if isinstance(known, _Known) and not (through and block.last):
            return self._repeat(known, inputs, learned, through)
        call = _Call(self.trace, key, learned, self._gradients)
        return call.follow(run, inputs, spec, through, known if isinstance(known, _Known) else None, self._known)

    def _repeat(self, known: _Known, inputs: list[Any], learned: list[nn.Parameter], through: bool) -> Any:
        self.trace.bump(known.peak)
        if through:
            carrying = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
            tensors = [t for t in inputs if isinstance(t, Tensor)]
            kept = [t.detach() for t, keep in zip(tensors, known.keeps, strict=True) if keep]
            with self.trace.unseen():
                made = list(_Repeated.apply(self.trace, self._gradients, known, kept, learned, *carrying))
        else:
            with self.trace.unseen():
                made = [_empty(each) for each in known.outputs if isinstance(each, tuple)]
        made.reverse()
        outputs = [made.pop() if isinstance(each, tuple) else each for each in known.outputs]
        return tree_unflatten(outputs, known.spec)


_NOT_KNOWN = object()


class _Block:
    """A module that occurs more than once in its network.

    Args:
        module: The block.
        structure: Number of its structure; equal blocks have equal ones.
        last: Whether the next in its list is another one.
    """

    def __init__(self, module: nn.Module, structure: int, last: bool) -> None:
        self.module, self.structure, self.last = module, structure, last
        self._named = list(module.named_parameters())
        self._adapted = next((m for m in module.modules() if hasattr(m, "_active_adapter")), None)

    def key(self) -> Any:
        """What decides what a call does, except its inputs."""
        active = tuple(getattr(self._adapted, "_active_adapter", ()))
        kinds = tuple(
            tuple((p.shape, p.requires_grad) for name, p in self._named if ".lora_" in name and f".{adapter}." in name)
            for adapter in active
        )
        base = tuple(p.requires_grad for name, p in self._named if ".lora_" not in name)
        dropped = tuple(hasattr(p, DROPS) for p in self.learned())
        return self.structure, self.module.training, kinds, base, dropped

    def learned(self) -> list[nn.Parameter]:
        """Parameters that a backward pass gives a gradient."""
        active = tuple(getattr(self._adapted, "_active_adapter", ()))
        return [
            p
            for name, p in self._named
            if p.requires_grad and (".lora_" not in name or any(f".{adapter}." in name for adapter in active))
        ]


class _Call:
    """A call that is followed."""

    def __init__(self, trace: Trace, key: Any, learned: list[nn.Parameter], gradients: _Gradients) -> None:
        self.trace, self.key, self.learned, self.gradients = trace, key, learned, gradients
        self._watching: AbstractContextManager[Watch] | None = None

    def follow(
        self,
        run: Callable[..., Any],
        inputs: list[Any],
        spec: TreeSpec,
        through: bool,
        known: _Known | None,
        store: Any,
    ) -> Any:
        """Run, and note in ``store`` what it did."""
        tensors = [t for t in inputs if isinstance(t, Tensor)]
        storages = [t.untyped_storage() for t in tensors]
        before, held = self.trace.current, [_uses(s) for s in storages]
        with self.trace.watch() as watch:
            args, kwargs = tree_unflatten(self._entered(inputs) if through else inputs, spec)
            result = run(*args, **kwargs)
            del args, kwargs
        outputs, out_spec = tree_flatten(result)
        del result
        made = [t for t in outputs if isinstance(t, Tensor)]
        if not _own(made, storages):
            store[self.key] = None
            return tree_unflatten(outputs, out_spec)
        if known is None:
            described = [
                (t.size(), t.stride(), t.dtype, t.requires_grad) if isinstance(t, Tensor) else t for t in outputs
            ]
            kept = self.trace.current - before - sum(t.untyped_storage().nbytes() for t in made)
            keeps = tuple(_uses(s) > count for s, count in zip(storages, held, strict=True))
            known = store[self.key] = _Known(described, out_spec, watch.peak - before, kept, keeps)
        self.known = known
        if through and any(t.requires_grad for t in made):
            marked = iter(_Mark.apply(self._leaving, *[t for t in made if t.requires_grad]))
            outputs = [next(marked) if isinstance(t, Tensor) and t.requires_grad else t for t in outputs]
        return tree_unflatten(outputs, out_spec)

    def _entered(self, inputs: list[Any]) -> list[Any]:
        """The inputs as views; the backward pass ends when it has their gradients."""
        marked = iter(_Mark.apply(self._done, *[t for t in inputs if isinstance(t, Tensor) and t.requires_grad]))
        return [(next(marked) if t.requires_grad else t.detach()) if isinstance(t, Tensor) else t for t in inputs]

    def _leaving(self, _: Any) -> None:
        """The backward pass begins."""
        self._state, self._before = self.gradients.state(self.learned), self.trace.current
        self._watching = self.trace.watch()
        self._watch = self._watching.__enter__()

    def _done(self, grads: tuple[Tensor | None, ...]) -> None:
        if self._watching is None:
            return  # the outputs share storages with others, so that nothing is noted
        self._watching.__exit__(None, None, None)
        self._watching = None
        given = tuple(grad is not None for grad in grads)
        self.gradients.given(self.learned)
        self.known.backward.setdefault(self._state, (self._watch.peak - self._before, given))


class _Gradients:
    """Which parameters have a gradient already: none, one in ``grad``, or one from the same backward pass."""

    def __init__(self) -> None:
        self._pass: dict[int, int] = {}

    def state(self, parameters: list[nn.Parameter]) -> tuple[int, ...]:
        """0, 1 or 2 for each parameter."""
        now = torch._C._current_graph_task_id()
        given = [p for p in parameters if not hasattr(p, DROPS)]
        return tuple(2 if self._pass.get(id(p)) == now else int(p.grad is not None) for p in given)

    def given(self, parameters: list[nn.Parameter]) -> None:
        """Note that these have one from this pass, in ``grad`` or waiting for others that are added to it."""
        self._pass.update(dict.fromkeys(map(id, parameters), torch._C._current_graph_task_id()))


class _Mark(torch.autograd.Function):
    """Passes tensors on, and says when their gradients are known."""

    @staticmethod
    def forward(ctx: Any, event: Callable[[Any], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.event = event
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ctx.event(grads)
        return (None, *grads)


class _Repeated(torch.autograd.Function):
    """Holds and returns what a followed block held and returned."""

    @staticmethod
    def forward(
        ctx: Any,
        trace: Trace,
        gradients: _Gradients,
        known: _Known,
        kept: list[Tensor],
        learned: list[nn.Parameter],
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.trace, ctx.gradients, ctx.known, ctx.learned = trace, gradients, known, learned
        ctx.kept = [*kept, torch.empty(known.kept, dtype=torch.uint8, device="meta")]
        ctx.like = [(t.size(), t.dtype) for t in inputs]
        ctx.set_materialize_grads(False)
        described = [each for each in known.outputs if isinstance(each, tuple)]
        made = [_empty(each) for each in described]
        ctx.mark_non_differentiable(*[t for t, each in zip(made, described, strict=True) if not each[3]])
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        found = ctx.known.backward.get(ctx.gradients.state(ctx.learned))
        if found is None:
            raise NotRecorded
        peak, given = found
        ctx.trace.bump(peak)
        with ctx.trace.unseen():
            ctx.kept = None
            for parameter in ctx.learned:
                if parameter.grad is None and not hasattr(parameter, DROPS):
                    parameter.grad = torch.empty_like(parameter)
            grads = [
                torch.empty(size, dtype=dtype, device="meta") if has else None
                for (size, dtype), has in zip(ctx.like, given, strict=True)
            ]
        ctx.gradients.given(ctx.learned)
        return (None, None, None, None, None, *grads)


def _size(module: nn.Module) -> int:
    """Number of submodules, without those of adapters."""
    return 1 if hasattr(module, "_active_adapter") else 1 + sum(_size(child) for child in module.children())


def _empty(like: tuple[Any, ...]) -> Tensor:
    return torch.empty_strided(like[0], like[1], dtype=like[2], device="meta")


def _flags(inputs: list[Any], gradient: bool) -> tuple[bool, ...]:
    return tuple(t.requires_grad for t in inputs if isinstance(t, Tensor)) if gradient else ()


def _uses(storage: Any) -> int:
    """Number of tensors that share a storage."""
    return int(torch._C._storage_Use_Count(storage._cdata))


def _own(outputs: list[Tensor], inputs: list[Any]) -> bool:
    """Whether every output has a storage of its own that it fills."""
    storages = [t.untyped_storage() for t in outputs]
    found = {storage._cdata for storage in storages}
    if len(found) < len(outputs) or found & {storage._cdata for storage in inputs}:
        return False
    return all(
        t.device.type == "meta"
        and t.untyped_storage().nbytes() == _empty((t.size(), t.stride(), t.dtype)).untyped_storage().nbytes()
        for t in outputs
    )


def _plain(module: nn.Module) -> Any:
    """A module's own settings: its attributes that are numbers, texts or truth values."""
    return tuple(
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    )
