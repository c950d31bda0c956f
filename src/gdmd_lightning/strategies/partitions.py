"""What a rank holds of a network under DeepSpeed, in one form for all ZeRO stages, or under FSDP2.

This is the only module that reads DeepSpeed's own attributes, those of version 0.19.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gdmd_lightning.strategies.shards import WEIGHT, Piece

Read = Callable[[str, str, int, int], Tensor]
"""``read(name, key, start, numel)``: a range of a flattened parameter, or of one of its moments, ``[numel]``."""


@dataclass(frozen=True)
class Part:
    """Where a range of a parameter is in a flat tensor.

    Args:
        name: The parameter's name.
        shape: Shape of the whole parameter.
        start: First element, in the flattened parameter.
        numel: Number of elements.
        offset: Position of the first element in the flat tensor.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Flat:
    """A flat tensor that this rank's optimizer steps, and what is in it; the rest is padding.

    Args:
        tensor: The weights in float32, ``[N]``.
        state: The optimizer's state of the tensor, empty before the first step.
        parts: What it holds.
    """

    tensor: Tensor
    state: dict[str, Any]
    parts: tuple[Part, ...]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether a parameter is partitioned over the ranks (ZeRO-3 or FSDP2)."""
    return hasattr(parameter, "ds_id") or isinstance(parameter, DTensor)


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also of one that is partitioned."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)  # type: ignore[attr-defined]
    return shape


def shard_of(parameter: nn.Parameter) -> Tensor:
    """This rank's own part of a partitioned parameter: rows (FSDP2), or a flat range with padding (ZeRO-3)."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    shard: Tensor = parameter.ds_tensor.data  # type: ignore[attr-defined]
    return shard


def bytes_held(network: nn.Module) -> int:
    """Bytes of a network's parameters that this rank holds now, gathered ones included."""
    held = 0
    for parameter in network.parameters():
        # The number of elements of a DTensor is that of the whole.
        gathered = 0 if isinstance(parameter, DTensor) else parameter.numel()
        held += gathered * parameter.element_size()
        held += shard_of(parameter).numel() * parameter.element_size() if is_sharded(parameter) else 0
    return held


def frozen_pieces(network: nn.Module, names: Mapping[int, str], rank: int) -> Iterator[Piece]:
    """This rank's pieces of a sharded network that is not trained."""
    for parameter in network.parameters():
        start, numel = _own_range(parameter, rank)
        if numel:
            yield Piece(names[id(parameter)], tuple(shape_of(parameter)), start, {WEIGHT: shard_of(parameter)[:numel]})


@torch.no_grad()
def load_frozen(network: nn.Module, names: Mapping[int, str], rank: int, read: Read) -> None:
    """Fill this rank's shards of a sharded network that is not trained."""
    for parameter in network.parameters():
        start, numel = _own_range(parameter, rank)
        if numel:
            shard_of(parameter)[:numel].copy_(read(names[id(parameter)], WEIGHT, start, numel))
    forget_gathered(network)


def forget_gathered(network: nn.Module) -> None:
    """After shards were changed: drop what is gathered of them, so that the next forward gathers again."""
    for parameter in network.parameters():
        # FSDP2 keeps nothing gathered between forwards.
        if hasattr(parameter, "ds_id") and parameter.ds_status.name == "AVAILABLE":  # type: ignore[attr-defined]
            parameter.partition()  # type: ignore[attr-defined]


@contextmanager
def whole(parameter: nn.Parameter) -> Iterator[Tensor]:
    """A parameter's values; if they are not gathered, they are inside, and all ranks must enter."""
    status = getattr(parameter, "ds_status", None)
    released = status is not None and status.name != "AVAILABLE"
    if released:
        parameter.all_gather()  # type: ignore[attr-defined]
    try:
        yield parameter.data
    finally:
        if released:
            parameter.partition()  # type: ignore[attr-defined]


def flats(engine: Any, names: Mapping[int, str], rank: int) -> list[Flat]:
    """The flat tensors of an engine's optimizer on this rank."""
    optimizer = engine.optimizer
    stage3 = engine.zero_optimization_stage() == 3
    groups = optimizer.fp16_groups if stage3 else optimizer.bit16_groups
    parts = _parts_of_shards if stage3 else _parts_of_partitions
    return [
        Flat(tensor, optimizer.optimizer.state.get(tensor, {}), tuple(parts(group, names, rank)))
        for tensor, group in zip(_flat_tensors(engine), groups, strict=True)
    ]


def _flat_tensors(engine: Any) -> list[Tensor]:
    stage3 = engine.zero_optimization_stage() == 3
    name = "fp32_partitioned_groups_flat" if stage3 else "single_partition_of_fp32_groups"
    found: list[Tensor] = getattr(engine.optimizer, name)
    return found


def _parts_of_partitions(group: list[Any], names: Mapping[int, str], rank: int) -> Iterator[Part]:
    """ZeRO 1 and 2: each rank steps one range of all parameters of a group in a row."""
    for parameter in group:
        mapping = parameter._hp_mapping
        if mapping is not None:
            where, offset = mapping.lp_fragment_address, mapping.hp_fragment_address.start
            yield Part(names[id(parameter)], tuple(parameter.shape), where.start, where.numel, offset)


def _parts_of_shards(group: list[Any], names: Mapping[int, str], rank: int) -> Iterator[Part]:
    """ZeRO-3: each rank steps its own range of every parameter."""
    offset = 0
    for parameter in group:
        start, numel = _own_range(parameter, rank)
        if numel:
            yield Part(names[id(parameter)], tuple(shape_of(parameter)), start, numel, offset)
        offset += parameter.partition_numel()


def _own_range(parameter: Any, rank: int) -> tuple[int, int]:
    """Start and length of a rank's range of a partitioned parameter, without padding."""
    start = rank * parameter.partition_numel()
    return start, max(min(parameter.ds_numel - start, parameter.partition_numel()), 0)


def trained_pieces(stepped: Iterable[Flat]) -> Iterator[Piece]:
    """This rank's pieces of a trained network, with the optimizer's moments, from its :func:`flats`.

    Raises:
        ValueError: If the optimizer has a state that is neither a number nor has an element per weight.
    """
    for flat in stepped:
        moments, scalars = _split(flat)
        for part in flat.parts:
            own = slice(part.offset, part.offset + part.numel)
            tensors = {WEIGHT: flat.tensor.data[own], **{key: moment[own] for key, moment in moments.items()}}
            yield Piece(part.name, part.shape, part.start, tensors, scalars)


def _split(flat: Flat) -> tuple[dict[str, Tensor], dict[str, float]]:
    moments, scalars = {}, {}
    for key, value in flat.state.items():
        if isinstance(value, Tensor) and value.shape == flat.tensor.shape:
            moments[key] = value
        elif not isinstance(value, Tensor) or value.numel() == 1:
            scalars[key] = float(value)
        else:
            raise ValueError(f"the optimizer's {key!r} has {value.numel()} elements for {flat.tensor.numel()} weights")
    return moments, scalars


@torch.no_grad()
def load_trained(
    engine: Any,
    names: Mapping[int, str],
    rank: int,
    read: Read,
    keys: Callable[[str], set[str]],
    scalars: Callable[[str], Mapping[str, float]],
) -> None:
    """Fill the weights and moments that an engine steps on this rank; then all ranks must call :func:`spread`.

    Args:
        engine: The network's engine.
        names: Names of its parameters, by id.
        rank: This rank.
        read: Where ranges come from.
        keys: What there is of a parameter: ``weight`` and its moments.
        scalars: The optimizer's numbers for a parameter.
    """
    optimizer = engine.optimizer
    for flat in flats(engine, names, rank):
        state: dict[str, Any] = {}
        place = place_of_scalars(optimizer.optimizer, flat.tensor)
        for part in flat.parts:
            own = slice(part.offset, part.offset + part.numel)
            for key in sorted(keys(part.name)):
                value = read(part.name, key, part.start, part.numel)
                if key == WEIGHT:
                    flat.tensor.data[own].copy_(value)
                else:
                    state.setdefault(key, torch.zeros_like(flat.tensor.data))[own].copy_(value)
            state |= {key: torch.tensor(value, device=place) for key, value in scalars(part.name).items()}
        if state:
            optimizer.optimizer.state[flat.tensor] = state


@torch.no_grad()
def spread(engine: Any) -> None:
    """Let the network have the weights that were loaded; all ranks together."""
    if engine.zero_optimization_stage() == 3:
        _spread_shards(engine)
    else:
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer.update_lp_params()


def place_of_scalars(optimizer: torch.optim.Optimizer, like: Tensor) -> torch.device:
    """Where an optimizer of torch keeps the number of its steps: with a fused or capturable one, next to the weights.

    Args:
        optimizer: The optimizer.
        like: One of its parameters.
    """
    with_weights = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return like.device if with_weights else torch.device("cpu")


def _spread_shards(engine: Any) -> None:
    """ZeRO-3: let the parameters have the values of the float32 tensors."""
    optimizer = engine.optimizer
    for number, tensor in enumerate(optimizer.fp32_partitioned_groups_flat):
        optimizer.fp16_partitioned_groups_flat[number].data.copy_(tensor.data)
        optimizer._unflatten_partitioned_parameters(number)
    forget_gathered(engine.module)


def before_backward(engine: Any) -> None:
    """What an engine does in its own forward: networks are called directly, by several roles."""
    engine.optimizer.clear_backward_seen_flag()
    engine._backward_prologue()


def drop_gradients(engine: Any) -> None:
    """Forget the backward passes since the last step, with what DeepSpeed clears in a step that it skips."""
    optimizer = engine.optimizer
    optimizer.zero_grad(set_to_none=True)
    if engine.zero_optimization_stage() == 3:
        optimizer._pre_step()
        optimizer.averaged_gradients = {}
        return
    optimizer.micro_step_id = -1  # as in a new optimizer
    if optimizer.cpu_offload:
        optimizer.reset_cpu_buffers()
        optimizer._offload_accumulated_param_ids = set()
    for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        kept.update(dict.fromkeys(kept))


def offloaded_gradients(engine: Any) -> list[tuple[Tensor, Tensor]]:
    """Flat weights and their gradients, if the optimizer is offloaded: DeepSpeed allocates these once."""
    return [(tensor, tensor.grad) for tensor in _flat_tensors(engine) if tensor.grad is not None]


def before_first_backward(engine: Any, offloaded: list[tuple[Tensor, Tensor]]) -> None:
    """Forget the last step's gradients, which DeepSpeed would use again for parameters without a new one.

    Args:
        engine: The engine.
        offloaded: Its :func:`offloaded_gradients` from before the first step.
    """
    buffer = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    summed = getattr(engine.optimizer, "accumulated_grads_in_cpu", {})
    for gradient in [*summed.values(), *([] if buffer is None else [buffer])]:
        gradient.zero_()
    for weights, gradient in offloaded:
        # The optimizer's zero_grad drops it, but DeepSpeed copies into it.
        weights.grad = gradient.zero_()
