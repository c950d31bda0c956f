"""The interface of roles, the same for copies and adapters.

Only the weights of the role that is learning get gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import NoisyLatents, in_micro_batches
from gdmd_lightning.roles.compiling import compile_blocks
from gdmd_lightning.roles.spec import TEACHER, Optimization, RoleSpec, check_specs
from gdmd_lightning.schedules import per_sample

Form = Literal["pipeline", "lora"]


class Roles(nn.Module, ABC):
    """The teacher and the roles that a method declares.

    Args:
        family: How a network is called.
        specs: The roles besides the teacher.
        micro_batch_size: Maximum number of latents per forward without gradient; ``None`` for no limit.

    Attributes:
        evaluations: Network evaluations of single latents so far, by role; guided ones count as often as
            the family evaluates the network for them, usually twice.
        learner: The role inside :meth:`learning`, if any.
    """

    def __init__(self, family: ModelFamily, specs: tuple[RoleSpec, ...], micro_batch_size: int | None = None) -> None:
        super().__init__()
        check_specs(specs)
        self.family, self.specs, self.micro_batch_size = family, specs, micro_batch_size
        self.learner: str | None = None
        self.evaluations: Counter[str] = Counter()

    def velocity(
        self,
        role: str,
        latents: NoisyLatents,
        *,
        guidance_scale: float = 1.0,
        adapter_scale: float = 1.0,
        through: bool = False,
    ) -> Tensor:
        """A role's velocity ``[B, C, H, W]``.

        Args:
            role: ``teacher`` or a declared name. Its weights carry gradient only inside :meth:`learning` of it.
            latents: ``B`` rows.
            guidance_scale: 1 for no guidance.
            adapter_scale: Factor on the role's adapter, where roles are adapters.
            through: Let gradient reach the *input* through frozen weights.

        Raises:
            KeyError: If there is no such role.
            UserError: If ``adapter_scale`` is not 1 and the role is not an adapter.
        """

        def call(network: nn.Module, part: NoisyLatents) -> Tensor:
            return self.family.predict_velocity(network, part.x, part.sigma, part.conditioning, guidance_scale)

        passes = 1 if guidance_scale == 1.0 else self.family.guided_passes
        return self._evaluate(role, latents, call, passes, adapter_scale, through)

    def x0(
        self,
        role: str,
        latents: NoisyLatents,
        *,
        guidance_scale: float = 1.0,
        adapter_scale: float = 1.0,
        through: bool = False,
    ) -> Tensor:
        """A role's clean latents ``[B, C, H, W]``; arguments and errors as in :meth:`velocity`."""
        v = self.velocity(role, latents, guidance_scale=guidance_scale, adapter_scale=adapter_scale, through=through)
        return latents.x0(v)

    def guidance(self, role: str, latents: NoisyLatents, guidance_scale: float) -> Tensor:
        """What guidance adds to a role's clean latents, ``(w - 1)(c - u)`` in ``x0``, ``[B, C, H, W]``.

        Source: Decoupled DMD (2511.22677), which evaluates it at levels of its own.
        """

        def call(network: nn.Module, part: NoisyLatents) -> Tensor:
            return self.family.guidance(network, part.x, part.sigma, part.conditioning, guidance_scale)

        return -per_sample(latents.sigma, latents.x) * self._evaluate(role, latents, call, 2, 1.0, False)

    def features(self, role: str, latents: NoisyLatents, *, through: bool = False) -> Tensor:
        """Intermediate features ``[B, tokens, D]`` of a role's network, for a GAN head; see :meth:`velocity`.

        Source: DMD2 (2405.14867), section 4.3: its discriminator reads the fake score's features.
        """

        def call(network: nn.Module, part: NoisyLatents) -> Tensor:
            return self.family.features(network, part.x, part.sigma, part.conditioning)

        return self._evaluate(role, latents, call, 1, 1.0, through)

    def logits(self, role: str, features: Tensor, *, through: bool = False) -> Tensor:
        """Logits ``[B]`` of a head on features ``[B, tokens, D]``; gradient as in :meth:`velocity`."""
        gradient = self._carries_gradient(role, through)
        with torch.set_grad_enabled(gradient), nullcontext() if role == self.learner else self._frozen(role):
            logits: Tensor = self.get_submodule(role)(features)
            return logits

    def _evaluate(
        self,
        role: str,
        latents: NoisyLatents,
        call: Callable[[nn.Module, NoisyLatents], Tensor],
        passes: int,
        adapter_scale: float,
        through: bool,
    ) -> Tensor:
        self.evaluations[role] += len(latents) * passes
        gradient = self._carries_gradient(role, through)
        with self._active(role, adapter_scale) as network, torch.set_grad_enabled(gradient):
            if gradient:
                with nullcontext() if role == self.learner else self._frozen(role):
                    return call(network, latents)
            return in_micro_batches(
                lambda rows: call(network, latents.select(rows)), len(latents), self.micro_batch_size
            )

    def _carries_gradient(self, role: str, through: bool) -> bool:
        return torch.is_grad_enabled() and (role == self.learner or through)

    @contextmanager
    def _frozen(self, role: str) -> Iterator[None]:
        """Inside, the role's weights do not require gradient."""
        weights = [] if role == TEACHER else [p for p in self.parameters_of(role) if p.requires_grad]
        for weight in weights:
            weight.requires_grad_(False)
        try:
            yield
        finally:
            for weight in weights:
                weight.requires_grad_(True)

    @contextmanager
    def learning(self, role: str) -> Iterator[None]:
        """Inside, only this role's weights carry gradient; its own network, if it has one, is in training mode.

        The others are frozen until the backward passes are over: with gradient checkpointing, these compute forwards
        again, and must find what the first ones found.

        Raises:
            KeyError: If the role is not trained.
        """
        if role not in self.trained:
            raise KeyError(f"role {role!r} is not trained; trained roles are {', '.join(self.trained)}")
        self.learner = role
        self._set_training(role, True)
        try:
            with ExitStack() as others:
                for other in self.trained:
                    if other != role:
                        others.enter_context(self._frozen(other))
                yield
        finally:
            self.learner = None
            self._set_training(role, False)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the trained roles, in the order of their specs."""
        return tuple(spec.name for spec in self.specs if spec.optimizer is not None)

    def optimization_of(self, role: str) -> Optimization:
        """Optimizer settings of a trained role; raises ``KeyError`` for any other."""
        return {spec.name: spec.optimizer for spec in self.specs if spec.optimizer is not None}[role]

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the roles that are heads."""
        return tuple(spec.name for spec in self.specs if spec.head is not None)

    def update_averages(self, role: str) -> None:
        """Move the averages of a trained role toward it."""
        for spec in self.specs:
            if spec.average_of == role:
                self._average(spec.name, role, spec.decay)

    def move_average(self, average: str, role: str, decay: float) -> None:
        """``average = decay average + (1 - decay) role``, for averages that the method moves itself."""
        self._average(average, role, decay)

    def reset_followers(self) -> None:
        """Make every average and snapshot equal to the role that it follows."""
        for spec in self.specs:
            if spec.source is not None:
                self.copy(spec.source, spec.name)

    def start_names(self) -> list[str]:
        """Names in :meth:`state_dict` of frozen adapters that roles are on top of."""
        return []

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Build what a state, such as a checkpoint's, has in addition to the declared roles; values are not loaded."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the whole tensors of :meth:`state_dict`, by name."""
        return {name: tuple(tensor.shape) for name, tensor in self.state_dict().items()}

    def fill(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Load a role's own tensors, by their names in :meth:`state_dict`; all of them must be given."""
        self.load_state_dict(dict(weights), strict=False)

    def lockstep(self, role: str) -> AbstractContextManager[None]:
        """Inside, ranks may evaluate the role a different number of times, even where its weights are in shards.

        All ranks must enter and leave, and evaluate no other role that is in shards inside.
        """
        return nullcontext()

    def _set_training(self, role: str, mode: bool) -> None:
        """Switch the role's own network, if it has one, to training mode or back."""

    @abstractmethod
    def _active(self, role: str, adapter_scale: float = 1.0) -> AbstractContextManager[nn.Module]:
        """Inside, the yielded network acts as the role."""

    @abstractmethod
    def _average(self, average: str, role: str, decay: float) -> None:
        """``average = decay average + (1 - decay) role``."""

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Copy a role's weights to another role."""

    @abstractmethod
    def parameters_of(self, role: str) -> list[nn.Parameter]:
        """Parameters that belong to a role other than the teacher."""

    @abstractmethod
    def names_of(self, role: str) -> list[str]:
        """Names of the role's own tensors in :meth:`state_dict`; the teacher's are the rest."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Let trained roles recompute activations in the backward pass instead of storing them."""

    def compile_blocks(self, *, frozen: bool) -> None:
        """Compile the repeated blocks of all networks, or of those that are not trained (``frozen``), in place."""
        for network in self.networks(frozen=frozen):
            hooked = self.family.feature_module(network) if self.heads else None
            compile_blocks(network, self.family.repeated_blocks, hooked)

    @abstractmethod
    def networks(self, *, frozen: bool = False) -> list[nn.Module]:
        """The networks in memory, or those of them that are not trained (``frozen``); heads are not networks."""

    @abstractmethod
    def standalone(self, role: str) -> nn.Module:
        """A network that is this role alone, with the modules of the teacher's class, for export.

        That of the teacher has the teacher's dtype, others are float32.
        """

    @abstractmethod
    def write_adapter(self, role: str, directory: Path) -> nn.Module:
        """Write a role's LoRA adapter in the form that the family's pipeline loads; returns the base network.

        Raises:
            UserError: If roles are full copies.
        """

    @abstractmethod
    def is_frozen(self, name: str) -> bool:
        """Whether a tensor of :meth:`state_dict` belongs to the teacher; its pipeline provides those."""
