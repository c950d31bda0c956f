"""A Lightning strategy for FSDP2 with any number of optimizers, networks in shards, and plain checkpoints.

Lightning's ``ModelParallelStrategy`` loads weights before the module has checked a checkpoint, numbers the moments of
an optimizer by the whole module's parameters, and converts bfloat16 networks to float32. This module needs torch and
Lightning, and nothing else of this package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from gdmd_lightning.strategies.sharding import Weights, fill, gathered, part_of, whole_of, write


class FSDP2Strategy(ModelParallelStrategy):
    """FSDP2: every network that :meth:`build` builds is in shards, each rank holding rows of every weight.

    A few small parameters, such as adapters on a frozen network, can stay whole on every rank: :meth:`keep_whole`.

    Checkpoints are plain files, gathered to rank 0 one tensor at a time and written by the trainer's checkpoint IO.
    They have the form that a single process would write. The module's ``state_dict`` decides what they hold.

    Args:
        process_group_backend: ``nccl`` or ``gloo``; null for the device's usual one.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        # The data-parallel size is known once the ranks are.
        super().__init__(
            tensor_parallel_size=1, save_distributed_checkpoint=False, process_group_backend=process_group_backend
        )
        self._kept_whole: set[nn.Parameter] = set()

    # Construction in shards.

    def build(
        self,
        build: Callable[[], nn.Module],
        weights: Weights,
        *,
        dtype: torch.dtype | None = None,
        rounded: torch.dtype | None = None,
    ) -> nn.Module:
        """Build a network in shards and fill it; it is never whole on a rank. Call it in ``configure_model``.

        Args:
            build: Constructs the network. Modules of the classes in its ``_no_split_modules`` are gathered one at a
                time, the rest with the whole network.
            weights: ``.safetensors`` files, their directory, or a state dict.
            dtype: Of the weights; null for float32.
            rounded: Round the weights to this dtype first, and then convert them to ``dtype``.

        Raises:
            MisconfigurationException: If the weights are not those of the network.
        """
        with torch.random.fork_rng(devices=[]), _parameters_on_meta():
            network = build()
        network = self.shard(network.to(dtype or torch.float32))
        try:
            fill(network, weights, rounded)
        except ValueError as error:
            raise MisconfigurationException(f"the weights are not those of the network: {error}") from error
        return network

    def shard(self, network: nn.Module) -> nn.Module:
        """Put a network in shards on the ranks' devices; weights without values stay without.

        Every rank must have the same values.
        """
        mesh = self._mesh
        units = set(getattr(network, "_no_split_modules", None) or ())
        for module in reversed([module for module in network.modules() if type(module).__name__ in units]):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)
        if any(parameter.is_meta for parameter in network.parameters()):
            buffers = [(m, name, b) for m in network.modules() for name, b in m.named_buffers(recurse=False)]
            network.to_empty(device=self.root_device)
            for module, name, buffer in buffers:
                setattr(module, name, buffer.to(self.root_device))
        return network

    @cached_property
    def _mesh(self) -> DeviceMesh:
        # peft takes shards on a mesh of Lightning's name, "data_parallel", for those of tensor parallelism.
        ranks = self.device_mesh["data_parallel"]
        return DeviceMesh.from_group(ranks.get_group(), ranks.device_type, mesh_dim_names=("fsdp",))

    def keep_whole(self, parameters: Iterable[nn.Parameter]) -> None:
        """Leave parameters whole on every rank, and average their gradients over the ranks in each backward pass.

        Call it in ``configure_model``, with parameters that are not in shards, require gradient and have the same
        values on every rank. All ranks must run the same backward passes.
        """
        for parameter in parameters:
            self._kept_whole.add(parameter)
            # What earlier backward passes left is the same on all ranks, so its average is itself.
            parameter.register_post_accumulate_grad_hook(_average_gradient)

    def full_weights(self, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of a network's state dict, one tensor at a time; all ranks must iterate."""
        return gathered(network)

    # Lightning's life of a strategy.

    def connect(self, model: pl.LightningModule) -> None:
        """Use Lightning's precision of one device: that of FSDP converts networks to one dtype.

        Raises:
            MisconfigurationException: If the precision is not supported.
        """
        super().connect(model)
        precision = self.precision_plugin.precision
        if precision not in ("32-true", "bf16-mixed"):
            raise MisconfigurationException(f"precision {precision!r} is not supported: use 32-true or bf16-mixed")
        kind = self.root_device.type
        self.precision_plugin = Precision() if precision == "32-true" else MixedPrecision("bf16-mixed", kind)

    def setup_environment(self) -> None:
        """Start the process group, with all ranks in one group of shards."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        """Build the optimizers of networks that are in shards already."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        trained = [p for p in self.lightning_module.parameters() if p.requires_grad and p not in self._kept_whole]
        whole = [p for p in trained if not isinstance(p, DTensor)]
        if whole and trainer.state.fn == TrainerFn.FITTING:
            raise MisconfigurationException(
                f"{len(whole)} trained parameters are not in shards: build their networks with the strategy's build "
                "or shard in configure_model, or give them to keep_whole"
            )
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    # Checkpoints.

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Moments are loaded by :meth:`load_optimizer_state_dict`."""
        return True

    @torch.no_grad()
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The module's state dict, whole on rank 0 and empty on others."""
        assert self.lightning_module is not None
        return dict(self._on_rank_0(self.lightning_module.state_dict()))

    @torch.no_grad()
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """An optimizer's state in torch's form, whole on rank 0 and without moments on others."""
        own = optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        state = own.state_dict()
        return {**state, "state": {number: dict(self._on_rank_0(each)) for number, each in state["state"].items()}}

    def _on_rank_0(self, tensors: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in tensors.items():
            whole = whole_of(value) if isinstance(value, Tensor) else value
            if self.is_global_zero:
                # A copy, which the next update does not change.
                yield name, whole.cpu().clone() if isinstance(whole, Tensor) else whole

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint; the module checks it before :meth:`load_model_state_dict` changes any weight."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what the module's ``state_dict`` names.

        Raises:
            MisconfigurationException: If a tensor is missing.
        """
        assert self.lightning_module is not None
        mine, state = self.lightning_module.state_dict(), checkpoint["state_dict"]
        missing = mine.keys() - state.keys()
        if strict and missing:
            raise MisconfigurationException(f"the checkpoint lacks {len(missing)} tensors, the first is {min(missing)}")
        for name in mine.keys() & state.keys():
            write(mine[name], state[name])

    @torch.no_grad()
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load settings and moments, each rank its part."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                number: {key: _like(value, parameters[number]) for key, value in own.items()}
                for number, own in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": parts})


def _average_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    distributed.all_reduce(parameter.grad)
    parameter.grad.div_(distributed.get_world_size())  # gloo has no average


def _like(value: Any, parameter: nn.Parameter) -> Any:
    """A moment in shards as its parameter is; other values as they are."""
    if isinstance(value, Tensor) and value.ndim and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return part_of(value, parameter)
    return value


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules are constructed with parameters that have no memory, and with their usual buffers."""
    from torch.nn.modules.module import register_module_parameter_registration_hook

    def drop(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None  # as it is
        return nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(drop)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()
