"""Networks that are partitioned over the ranks from construction on, and filled without ever being whole anywhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Weights = Mapping[str, Tensor] | Path | str | list[Path]
"""A state dict, or one or more ``.safetensors`` files, or a directory of them."""


@contextmanager
def constructed_in_shards(config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, each module is partitioned as soon as it is constructed; torch's random state stays as it is.

    Args:
        config: A DeepSpeed configuration with ZeRO-3.
    """
    import deepspeed

    with torch.random.fork_rng(devices=[]), deepspeed.zero.Init(config_dict_or_path=dict(config)):
        yield


@torch.no_grad()
def fill(network: nn.Module, weights: Weights, rounded: torch.dtype | None = None) -> None:
    """Load all weights of a network, module by module; only one module's parameters are whole at a time.

    Under ZeRO-3, rank 0 reads the parameters and gives the others their parts. Under FSDP2, every rank reads each
    parameter and keeps its part. Every rank reads buffers, and the parameters of networks that are not sharded.

    Args:
        network: The network, sharded or not; values are converted to its dtype.
        weights: Where they come from.
        rounded: Round floating-point values to this dtype first.

    Raises:
        ValueError: If weights are missing, unexpected or of another shape; one line that names the first.
    """
    stored, shapes = _reader(weights)

    def read(name: str) -> Tensor:
        value = stored(name)
        return value if rounded is None or not value.is_floating_point() else value.to(rounded)

    _check(shapes, dict(_wanted(network)))
    for prefix, module in network.named_modules():
        at = f"{prefix}." if prefix else ""
        with _whole(module, modifier=0):
            for name, parameter in module.named_parameters(recurse=False):
                if not hasattr(parameter, "ds_id") or torch.distributed.get_rank() == 0:
                    write(parameter, read(at + name))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                buffer.copy_(read(at + name))


@torch.no_grad()
def write(target: Tensor, value: Tensor) -> None:
    """Set a tensor to a whole value; of a tensor in shards (FSDP2), this rank's part. Ranks need not agree on when."""
    if isinstance(target, DTensor):
        target.to_local().copy_(part_of(value, target).to_local())
    else:
        target.data.copy_(value)


def part_of(value: Tensor, like: DTensor) -> DTensor:
    """A whole tensor in shards as another one of its shape is; every rank has the value, so nothing is exchanged."""
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def whole_of(value: Tensor) -> Tensor:
    """A tensor that may be in shards (FSDP2), whole; all ranks must call it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


@torch.no_grad()
def gathered(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a network's state dict in its order, each whole while it is yielded; all ranks must iterate."""
    for prefix, module in network.named_modules():
        at = f"{prefix}." if prefix else ""
        with _whole(module):
            for name, parameter in module.named_parameters(recurse=False):
                yield at + name, whole_of(parameter.detach())
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield at + name, buffer


@contextmanager
def _whole(module: nn.Module, modifier: int | None = None) -> Iterator[None]:
    """Inside, a module's own parameters are whole; afterwards those of the modifying rank count."""
    sharded = [parameter for parameter in module.parameters(recurse=False) if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded, modifier_rank=modifier):
        yield


def _wanted(network: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of what a network's state dict holds."""
    for prefix, module in network.named_modules():
        at = f"{prefix}." if prefix else ""
        for name, parameter in module.named_parameters(recurse=False):
            yield at + name, tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield at + name, tuple(buffer.shape)


def _check(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    for what, names in (("missing", wanted.keys() - found.keys()), ("unexpected", found.keys() - wanted.keys())):
        if names:
            raise ValueError(f"{len(names)} weights are {what}, the first is {min(names)}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise ValueError(f"{name} has shape {found[name]}, not {shape}")


def _reader(weights: Weights) -> tuple[Callable[[str], Tensor], dict[str, tuple[int, ...]]]:
    """How to read a tensor, and the shapes of all."""
    if isinstance(weights, Mapping):
        state = weights
        return lambda name: state[name], {name: tuple(value.shape) for name, value in state.items()}
    files = weights if isinstance(weights, list) else _files(Path(weights))
    where: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118
                where[name], shapes[name] = file, tuple(content.get_slice(name).get_shape())

    def read(name: str) -> Tensor:
        with safe_open(where[name], "pt") as content:
            tensor: Tensor = content.get_tensor(name)
            return tensor

    return read, shapes


def _files(path: Path) -> list[Path]:
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        raise ValueError(f"no .safetensors file at {str(path)!r}")
    return found
