"""A Lightning strategy for DeepSpeed with one engine per trained network, and frozen networks in shards.

Lightning's own DeepSpeed strategy has one engine and one optimizer; a GAN or a distillation has two or more, and
networks that only look on. This module needs torch, Lightning and DeepSpeed, and nothing else of this package.
"""

from __future__ import annotations

import itertools
import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from gdmd_lightning.strategies import partitions, shards
from gdmd_lightning.strategies.engine_config import check_config, check_installed, engine_config, unknown_role
from gdmd_lightning.strategies.saved_weights import NoSavedWeights
from gdmd_lightning.strategies.sharding import Weights, constructed_in_shards, fill, gathered
from gdmd_lightning.strategies.sources import source_of
from gdmd_lightning.strategies.together import failing_together, write_together
from gdmd_lightning.strategies.trained import Trained, alone

Stage = Literal[1, 2, 3]


class MultiEngineDeepSpeedStrategy(DDPStrategy):
    """DeepSpeed with one engine per optimizer, each with its own ZeRO stage and configuration.

    The module optimizes manually. Each optimizer has the parameters of one submodule, whose name is its role. A
    module can also say so itself, with a method ``trained_networks() -> dict[str, Trained]`` in the order of
    ``configure_optimizers``.

    Args:
        stage: ZeRO stage of trained networks: 1 shards the optimizer, 2 also gradients, 3 also weights.
        stages: Stages of single roles.
        config: DeepSpeed configuration of all engines, merged into the one made here: ``bf16``, ``offload_optimizer``
            in ``zero_optimization``, and so on.
        configs: DeepSpeed configurations of single roles, merged last. ``frozen`` is that of networks built by
            :meth:`frozen`.
        shard_frozen: Whether networks that are built by :meth:`frozen` are in shards.
        process_group_backend: ``nccl`` or ``gloo``; null for the device's usual one.

    Raises:
        MisconfigurationException: If DeepSpeed is missing or too old, or a setting belongs elsewhere.
    """

    def __init__(
        self,
        stage: Stage = 2,
        stages: dict[str, Stage] | None = None,
        config: dict[str, Any] | None = None,
        configs: dict[str, dict[str, Any]] | None = None,
        shard_frozen: bool = True,
        process_group_backend: str | None = None,
    ) -> None:
        check_installed()
        super().__init__(process_group_backend=process_group_backend)
        self.stage, self.stages = stage, dict(stages or {})
        self.config, self.configs = dict(config or {}), dict(configs or {})
        self.shard_frozen = shard_frozen
        for role, number in {"": stage, **self.stages}.items():
            if number not in (1, 2, 3):
                raise MisconfigurationException(f"ZeRO stage {number} of {role or 'all roles'}: use 1, 2 or 3")
        check_config({"": self.config, **self.configs}, {"": stage, **self.stages})
        self.engines: dict[str, Any] = {}
        self._built: list[nn.Module] = []
        self._frozen: list[nn.Module] = []
        self._trained: dict[str, Trained] = {}
        self._ended: dict[str, list[partitions.Flat]] = {}
        self._groups: dict[str, list[list[str]]] = {}
        self._frozen_engines: list[Any] = []
        self._gathering: list[NoSavedWeights] = []
        self._names: dict[int, str] = {}
        self._backwards: dict[str, int] = {}
        self._offloaded: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._learning: str | None = None

    # Frozen networks, and construction in shards.

    def frozen(self, build: Callable[[], nn.Module], weights: Weights, dtype: torch.dtype | None = None) -> nn.Module:
        """Build a network that is not trained, in shards from construction on, and fill it.

        Call it in ``configure_model``. The network is never whole on a rank, and not written to checkpoints unless
        the module's ``state_dict`` has its names.

        Args:
            build: Constructs the network; it should allocate all weights in constructors of its modules.
            weights: Its weights: ``.safetensors`` files, their directory, or a state dict.
            dtype: Of the weights; null for float32.

        Returns:
            The network, frozen and in evaluation mode. A forward gathers what it needs and frees it again.

        Raises:
            MisconfigurationException: If the weights are not those of the network.
        """
        network = self.build(build, weights, sharded=self.shard_frozen, dtype=dtype)
        return network.requires_grad_(False).eval()

    def build(
        self,
        build: Callable[[], nn.Module],
        weights: Weights,
        *,
        sharded: bool,
        dtype: torch.dtype | None = None,
        rounded: torch.dtype | None = None,
    ) -> nn.Module:
        """Build a network, in shards or whole on every rank, and fill it; it may be trained.

        Args:
            build: As in :meth:`frozen`.
            weights: As in :meth:`frozen`.
            sharded: Whether it is in shards.
            dtype: As in :meth:`frozen`.
            rounded: Round the weights to this dtype first, and then convert them to ``dtype``.

        Raises:
            MisconfigurationException: If the weights are not those of the network.
        """
        if sharded:
            with constructed_in_shards(self.config_of("frozen", 3, dtype)):
                network = build()
            self._built.append(network)
        else:
            with torch.random.fork_rng(devices=[]):
                network = build()
        if dtype is not None:
            for tensor in network.buffers() if sharded else [*network.parameters(), *network.buffers()]:
                tensor.data = tensor.data.to(dtype) if tensor.is_floating_point() else tensor.data
        try:
            fill(network, weights, rounded)
        except ValueError as error:
            raise MisconfigurationException(f"the weights are not those of the network: {error}") from error
        return network

    def stage_of(self, role: str) -> int:
        """ZeRO stage of a trained network; its last name counts where the role is a path."""
        return self.stages.get(role, self.stages.get(role.rpartition(".")[2], self.stage))

    def config_of(self, role: str, stage: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
        """DeepSpeed's configuration of an engine."""
        names = dict.fromkeys((role.rpartition(".")[2], role))
        own = [self.configs[name] for name in names if name in self.configs]
        return engine_config(stage, dtype, self.config, own, trained=role != "frozen")

    # Lightning's life of a strategy.

    def connect(self, model: pl.LightningModule) -> None:
        """Fail early if the trainer's settings do not fit."""
        super().connect(model)
        trainer = model.trainer
        if model.automatic_optimization and trainer.state.fn == TrainerFn.FITTING:
            raise MisconfigurationException(
                f"{type(self).__name__} needs manual optimization: set automatic_optimization to False in "
                f"{type(model).__name__}, or use Lightning's own DeepSpeedStrategy for a single optimizer"
            )
        if trainer.gradient_clip_val:
            raise MisconfigurationException(
                "gradient_clip_val has no effect with several engines: set gradient_clipping in the strategy's "
                "configs, one per role"
            )
        if trainer.accumulate_grad_batches != 1:
            raise MisconfigurationException(
                "accumulate_grad_batches has no effect with manual optimization: call backward several times before "
                "a step"
            )
        if self.precision_plugin.precision not in ("32-true", "bf16-mixed"):
            raise MisconfigurationException(
                f"precision {self.precision_plugin.precision!r} is not supported: use 32-true or bf16-mixed, and "
                "bf16 or fp16 in the strategy's configs"
            )

    def setup_environment(self) -> None:
        """Start the process group, and tell DeepSpeed of it."""
        super().setup_environment()
        if self.root_device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        # DeepSpeed calls functions that torch has renamed, in every step.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if self.root_device.type == "cpu":
            from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

            # Another library may have imported DeepSpeed before, which then chose a GPU that is not used here.
            deepspeed.accelerator.set_accelerator(CPU_Accelerator())
            # Compiling this takes longer than a short run; gloo does the same.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend=self._get_process_group_backend(), dist_init_required=False)

    def setup(self, trainer: pl.Trainer) -> None:
        """Build the optimizers, then an engine for each, and one for each sharded network without an optimizer."""
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        module = self.lightning_module
        self.model_to_device()
        self._names = {id(parameter): name for name, parameter in module.named_parameters()}
        if any(id(p) not in self._names for each in self._trained.values() for p in each.network.parameters()):
            self._trained, self._ended = {}, {}  # of another module
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
            self._start_engines()
        trained = [each.network for each in self._trained.values()]
        if self.engines:
            self._frozen = [each for each in self._built if not _among(each, trained)]
        else:
            left = [each for each in trained if self.is_sharded(each) and not _among(each, self._built)]
            self._frozen = [*self._built, *left]
        self._frozen_engines = [self._watch(network) for network in self._frozen]
        self._gathering = [NoSavedWeights(each) for each in self._engine_networks() if self.is_sharded(each)]
        held = {id(parameter) for network in self._engine_networks() for parameter in network.parameters()}
        for tensor in [*(p for p in module.parameters() if id(p) not in held), *module.buffers()]:
            torch.distributed.broadcast(tensor.data, 0)
        self.setup_precision_plugin()  # gives optimizers new wrappers
        if self.engines:
            self._clear_engines_too()

    def _engine_networks(self) -> list[nn.Module]:
        return [*(self._trained[role].network for role in self.engines), *self._frozen]

    def _start_engines(self) -> None:
        import deepspeed

        self._trained, self._groups, self._ended = self._roles(), {}, {}
        if found := unknown_role(self.stages, self.configs, self._trained):
            raise MisconfigurationException(
                f"no optimizer trains {found[1]!r}, which is in the strategy's {found[0]}: use one of "
                f"{', '.join(self._trained)}"
            )
        for (role, trained), optimizer in zip(self._trained.items(), self.optimizers, strict=True):
            self._groups[role] = [
                [self._names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups
            ]
            config = self.config_of(role, self.stage_of(role))
            config.setdefault("gradient_clipping", trained.gradient_clipping)
            self.engines[role], *_ = deepspeed.initialize(
                model=trained.network, optimizer=optimizer, config=config, dist_init_required=False
            )
            self._offloaded[role] = partitions.offloaded_gradients(self.engines[role])
            self._backwards[role] = 0

    def _clear_engines_too(self) -> None:
        """Let ``zero_grad`` of an optimizer clear gradients in its engine, which torch's does not know."""
        for role, own, given in zip(self._trained, self.optimizers, self._lightning_optimizers, strict=True):
            own.zero_grad = given.zero_grad = partial(self._drop_gradients, role)  # type: ignore[attr-defined, method-assign]

    def _drop_gradients(self, role: str, set_to_none: bool = True) -> None:
        """``zero_grad`` of an optimizer: forget the backward passes since the role's last step."""
        if self._backwards[role]:
            partitions.drop_gradients(self.engines[role])
            self._backwards[role] = 0

    def _watch(self, network: nn.Module) -> Any:
        """Let a sharded network gather its weights when it is called."""
        import deepspeed

        dtype = next(network.parameters()).dtype
        flags = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
        engine, *_ = deepspeed.initialize(
            model=network, config=self.config_of("frozen", 3, dtype), dist_init_required=False
        )
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return engine

    def _roles(self) -> dict[str, Trained]:
        """The trained networks by role, in the order of the optimizers."""
        module: Any = self.lightning_module
        if hasattr(module, "trained_networks"):
            return dict(module.trained_networks())
        roles = {}
        for number, optimizer in enumerate(self.optimizers):
            names = [self._names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            path = _common_path(names)
            if not path or path in roles:
                raise MisconfigurationException(
                    f"the parameters of optimizer {number} are not those of one submodule: give each optimizer the "
                    f"parameters of one network, or define trained_networks() in {type(module).__name__}"
                )
            roles[path] = Trained(module.get_submodule(path))
        return roles

    def teardown(self) -> None:
        """Remove DeepSpeed's hooks; sharded weights stay in shards, and a training can still be saved."""
        if self.engines:
            self._ended = self._stepped()
        for watched in self._gathering:
            watched.remove()
        for engine in [*self.engines.values(), *self._frozen_engines]:
            engine.destroy()
        self.engines, self._frozen_engines, self._gathering, self._offloaded = {}, [], [], {}
        assert self.cluster_environment is not None
        assert self.accelerator is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()

    # A step.

    @contextmanager
    def learning(self, role: str) -> Iterator[None]:
        """Inside, ``manual_backward`` reaches this role's weights only.

        Raises:
            MisconfigurationException: If no optimizer has such a role.
        """
        before, self._learning = self._learning, self._role(role)
        every = (parameter for each in self._trained.values() for parameter in each.network.parameters())
        try:
            with alone(self._trained[self._learning].network, every):
                yield
        finally:
            self._learning = before

    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, role: str | None = None, **kwargs: Any
    ) -> Tensor:
        """Add the gradient of a loss to a role's, which is ``role``, or that of :meth:`learning`."""
        if role is None and self._learning is None:
            raise MisconfigurationException(
                f"whose loss is it? Use `with learning(module, role):` or manual_backward(loss, role=...) with one of "
                f"{', '.join(self.engines)}"
            )
        name = self._role(role) if role is not None else str(self._learning)
        engine = self.engines[name]
        if not self._backwards[name]:
            partitions.before_first_backward(engine, self._offloaded[name])
        self._backwards[name] += 1
        assert self.lightning_module is not None
        closure_loss = self.precision_plugin.pre_backward(closure_loss, self.lightning_module)
        partitions.before_backward(engine)
        engine.backward(closure_loss, **kwargs)
        return self.precision_plugin.post_backward(closure_loss, self.lightning_module)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: pl.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Average the gradients over the ranks, clip them and step; a gradient that is not finite steps nothing."""
        result = closure()
        role = self._role_of(optimizer)
        if not self._backwards[role]:
            raise MisconfigurationException(f"a step of {role!r} without a backward of its loss")
        self._backwards[role] = 0
        self.engines[role].step()
        return result

    def step_taken(self, role: str) -> bool:
        """Whether the last step of a role changed its weights: not if its gradient was not finite."""
        return bool(self.engines[self._role(role)].was_step_applied())

    def gradient_norm(self, role: str) -> Tensor:
        """Gradient norm of a role's last step before clipping, over all ranks; infinite if it was not finite."""
        norm = self.engines[self._role(role)].get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self.root_device)

    def _role(self, name: str) -> str:
        matching = [role for role in self.engines if role == name or role.rpartition(".")[2] == name]
        if len(matching) != 1:
            raise MisconfigurationException(f"no optimizer trains {name!r}: use one of {', '.join(self.engines)}")
        return matching[0]

    def _role_of(self, optimizer: Optimizer) -> str:
        wanted = optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
        return next(role for role, own in zip(self._trained, self.optimizers, strict=True) if own is wanted)

    # What is in shards.

    def is_sharded(self, network: nn.Module) -> bool:
        """Whether a network's weights are in shards."""
        return any(partitions.is_sharded(parameter) for parameter in network.parameters())

    def full_weights(self, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Names and whole tensors of a network's state dict, one module at a time; all ranks must iterate."""
        return gathered(network)

    def pieces(self) -> dict[str, list[shards.Piece]]:
        """What this rank holds of the networks that a checkpoint has, by role."""
        assert self.lightning_module is not None
        saved = self.lightning_module.state_dict().keys()
        found: dict[str, list[shards.Piece]] = {}
        stepped = self._stepped()
        for role, flats in stepped.items():
            found[_unused(role, found)] = list(partitions.trained_pieces(flats))
        for network in self._frozen:
            if _among(network, [self._trained[role].network for role in stepped]):
                continue
            path = self._path_of(network)
            if any(f"{path}.{each}" in saved for each, _ in network.named_parameters()):
                own = partitions.frozen_pieces(network, self._names, self.global_rank)
                found[_unused(path, found)] = list(own)
        return found

    def _stepped(self) -> dict[str, list[partitions.Flat]]:
        """What each engine steps on this rank, or has stepped in the training that has ended."""
        if not self.engines:
            return self._ended
        return {role: partitions.flats(each, self._names, self.global_rank) for role, each in self.engines.items()}

    def _path_of(self, network: nn.Module) -> str:
        assert self.lightning_module is not None
        # A network that the module does not own is in no checkpoint.
        return next((name for name, each in self.lightning_module.named_modules() if each is network), "")

    # Checkpoints.

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Shards can be filled only when there are engines."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is not in an engine: buffers, and networks without an optimizer that are whole on every rank."""
        assert self.lightning_module is not None
        held = self._held()
        return {name: value for name, value in self.lightning_module.state_dict().items() if name not in held}

    def _held(self) -> set[str]:
        ended = [self._trained[role].network for role in self._ended]
        return {self._names.get(id(p), "") for each in [*self._engine_networks(), *ended] for p in each.parameters()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The settings of an optimizer; its moments are in the shards.

        Raises:
            MisconfigurationException: If the training has ended and other weights were loaded since.
        """
        if not self.engines and not self._ended:
            raise MisconfigurationException(
                "weights were loaded after the training, so there are no moments to save with them: "
                "use save_checkpoint(..., weights_only=True)"
            )
        role, own = self._role_of(optimizer), optimizer
        if isinstance(own, LightningOptimizer):
            own = own._optimizer
        groups, first = [], 0
        for names, group in zip(self._groups[role], own.param_groups, strict=True):
            numbers = list(range(first, first + len(names)))
            groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": numbers})
            first += len(names)
        return {"state": {}, "param_groups": groups}

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a directory, all ranks together; it gets its name when all have finished.

        Raises:
            MisconfigurationException: If a rank could not write; the previous checkpoint is unchanged.
        """
        assert self.lightning_module is not None
        trained = [[name for group in groups for name in group] for groups in self._groups.values()]
        rest = {**checkpoint, "names": list(self.lightning_module.state_dict()), "trained_names": trained}
        write_together(Path(self.broadcast(str(filepath))), rest, self.pieces())

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Read everything but the shards, which :meth:`load_model_state_dict` fills; plain checkpoints work too.

        Raises:
            MisconfigurationException: If it is damaged.
        """
        if not shards.is_sharded(checkpoint_path):
            return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=True)
        try:
            reader = shards.ShardedCheckpoint(checkpoint_path)
            return {**reader.rest(), "sharded": str(checkpoint_path)}
        except shards.ShardError as error:
            raise MisconfigurationException(str(error)) from error

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load what is whole on every rank, then fill weights and moments of the engines.

        Raises:
            MisconfigurationException: If the checkpoint lacks a tensor or has one in another shape, before any weight
                has changed; or if a rank finds it damaged.
        """
        assert self.lightning_module is not None
        self._ended = {}
        saved, held = self.lightning_module.state_dict(), self._held()
        shapes = {name: tuple(getattr(value, "shape", ())) for name, value in saved.items()}
        shapes |= {name: tuple(partitions.shape_of(p)) for name, p in self.lightning_module.named_parameters()}
        missing: Set[str] = frozenset()
        with failing_together("the checkpoint cannot be loaded"):
            source = source_of(checkpoint, self._groups)
            missing = saved.keys() - source.names()
            for name in sorted(saved.keys() & source.names()):
                if source.shape(name) != shapes[name]:
                    raise ValueError(f"{name} is {source.shape(name)} there, {shapes[name]} here")
            whole = {name: source.whole(name) for name in saved.keys() - held - missing}
        if strict and missing:
            raise MisconfigurationException(f"the checkpoint lacks {len(missing)} tensors, the first is {min(missing)}")
        self.lightning_module.load_state_dict(whole, strict=False)
        with failing_together("the checkpoint cannot be loaded"):
            for engine in self.engines.values():
                partitions.load_trained(engine, self._names, self.global_rank, source.read, source.keys, source.scalars)
            for network in self._frozen:
                if any(self._names.get(id(p)) in saved for p in network.parameters()):
                    partitions.load_frozen(network, self._names, self.global_rank, source.read)
        # Only when all have read theirs: the ranks communicate in it.
        for engine in self.engines.values():
            partitions.spread(engine)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the optimizers' settings; :meth:`load_model_state_dict` has loaded the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            for group, saved in zip(optimizer.param_groups, state["param_groups"], strict=True):
                group.update({key: value for key, value in saved.items() if key != "params"})


def _among(network: nn.Module, others: Iterable[nn.Module]) -> bool:
    return any(network is each for each in others)


def _unused(path: str, taken: Mapping[str, Any]) -> str:
    """The last name of a path, or all of it if that is taken."""
    last = path.rpartition(".")[2]
    return path if last in taken else last


def _common_path(names: list[str]) -> str:
    """The innermost submodule that all these parameters are in, empty for none."""
    parents = [name.split(".")[:-1] for name in names]
    shared = zip(*parents, strict=False)
    return ".".join(each[0] for each in itertools.takewhile(lambda parts: len(set(parts)) == 1, shared))
