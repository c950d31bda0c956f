"""Roles as LoRA adapters on one network: one base in memory, one adapter per role, none for the teacher.

peft's own ``set_adapter`` is not used to switch between roles, for two reasons. It turns off
``requires_grad`` of all other adapters, so a forward of the fake score between the generator's forward and
its backward leaves the generator without gradient. And with gradient checkpointing, blocks are recomputed
under whichever adapter is active at that time, which silently gives wrong gradients. Here a role is active
only within its own forward, and a checkpointed block is recomputed under the role that first computed it.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.ranges import Count, ranged
from gdmd_lightning.roles.base import Roles
from gdmd_lightning.roles.heads import FeatureHead
from gdmd_lightning.roles.spec import TEACHER, RoleSpec
from gdmd_lightning.streams import named_seed


@ranged
@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters instead of full weights.

    Args:
        rank: Rank of the two factors.
        alpha: Scale; the adapter's product is multiplied by ``alpha / rank``.
        targets: Suffixes of the names of the modules that get an adapter; empty for the family's own choice.
        start: What happens to the adapters of ``start_from``. ``continued``: they are trained further. ``merged``:
            each trained role keeps its average from there as part of its frozen network, and a new adapter, which may
            have another rank, is trained on top. The base cannot absorb them, since all roles share it.

    Source: LoRA (2106.09685); rank 32, alpha 64 as in RTDMD (2605.26108), whose second stage starts ``merged``.
    """

    rank: Count = 32
    alpha: Count = 64
    targets: tuple[str, ...] = ()
    start: Literal["continued", "merged"] = "continued"


@dataclass(frozen=True)
class Factors:
    """An adapter of one layer whose scale is part of its factors.

    Args:
        a: ``[r, in]``, or a convolution's kernel.
        b: ``[out, r]``, likewise.
    """

    a: Tensor
    b: Tensor

    def zeros(self, rank: int) -> Factors:
        """An adapter of this layer that does nothing, of rank ``rank``."""
        a, b = self.a, self.b
        return Factors(a.new_zeros(rank, *a.shape[1:]), b.new_zeros(len(b), rank, *b.shape[2:]))

    def named(self) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
        """The factors by peft's letters."""
        return ("A", self.a.contiguous()), ("B", self.b.contiguous())


class AdapterRoles(Roles):
    """One network with an adapter for each role except the teacher.

    The network stays in evaluation mode: none of the families' networks trains with dropout, and one module cannot
    be in both modes between a forward and the backward that recomputes it. Adapters are float32 whatever the
    network's precision, since bfloat16 would round away their small updates.

    Args:
        family: How the network is called.
        network: A loaded diffusers model; it is the teacher while no adapter is active.
        specs: The roles besides the teacher.
        micro_batch_size: As in :class:`Roles`.
        lora: Settings of every adapter.
        seed: Seed of the adapters' initial weights; a new adapter does not change the network's output.

    Raises:
        UserError: If a LoRA target matches no module of the network.
    """

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        specs: tuple[RoleSpec, ...],
        micro_batch_size: int | None = None,
        *,
        lora: LoRA,
        seed: int = 0,
    ) -> None:
        super().__init__(family, specs, micro_batch_size)
        self.network: Any = network.requires_grad_(False).eval()
        for spec in specs:
            if spec.head is not None:
                self.add_module(spec.name, FeatureHead(family.feature_width(network), spec.head))
        names = [spec.name for spec in specs if spec.head is None]
        _add_adapters(self.network, lora, _targets(family, network, lora), names, seed)
        self._set_up()
        self.reset_followers()

    def _set_up(self) -> None:
        """Undo what peft did when it added adapters: which of them are active and require gradient."""
        from peft.tuners.lora import LoraLayer

        self._layers = tuple(module for module in self.network.modules() if isinstance(module, LoraLayer))
        # Where the parameters of a role are: a large network has thousands of names, and every evaluation asks.
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._state: tuple[str | None, float] = (None, 1.0)
        self._activate(None)
        self.network.requires_grad_(False)
        for spec in self.specs:
            for parameter in self.parameters_of(spec.name):
                parameter.requires_grad_(spec.optimizer is not None)

    # What a role is on top of, if a run started from merged adapters.

    def _start_of(self, role: str) -> str | None:
        """Name of the frozen adapter under a role's own, ``None`` if there is none."""
        origin = next((spec.origin for spec in self.specs if spec.name == role), role)
        return start_name(origin) if start_name(origin) in self.network.peft_config else None

    def start_names(self) -> list[str]:
        return [name for name, _ in self.named_parameters() if is_start(name)]

    def adopt(self, state: Mapping[str, Tensor]) -> None:
        """Build the frozen adapters in a state, such as a checkpoint's, that these roles lack; values are not loaded.

        Args:
            state: Tensors by their names in :meth:`state_dict`.
        """
        found: dict[str, dict[str, int]] = {}
        for name, tensor in state.items():
            if match := re.fullmatch(r"network\.(.+)\.lora_A\.(.+@start)\.weight", name):
                found.setdefault(match[2], {})[match[1]] = len(tensor)
        origins = {spec.origin for spec in self.specs}
        for adapter, ranks in found.items():
            if adapter.removesuffix("@start") in origins and adapter not in self.network.peft_config:
                rank = max(ranks.values())
                _add_adapters(self.network, LoRA(rank, rank), sorted(ranks), [adapter], seed=0)
        self._set_up()

    def parameters_of(self, role: str) -> list[nn.Parameter]:
        if role in self.heads:
            return list(self.get_submodule(role).parameters())
        if role not in self._places:
            names = [name.rpartition(".") for name, _ in self.network.named_parameters() if _is_of(name, role)]
            self._places[role] = [(self.network.get_submodule(owner), name) for owner, _, name in names]
        return [getattr(owner, name) for owner, name in self._places[role]]

    def names_of(self, role: str) -> list[str]:
        if role == TEACHER:
            return [name for name in self.state_dict() if self.is_frozen(name)]
        if role in self.heads:
            return [name for name in self.state_dict() if name.startswith(f"{role}.")]
        return [name for name, _ in self.named_parameters() if _is_of(name, role)]

    def is_frozen(self, name: str) -> bool:
        return ".lora_" not in name and name.split(".")[0] not in self.heads

    def standalone(self, role: str) -> nn.Module:
        network: Any = copy.deepcopy(self.network)
        if role != TEACHER:
            # Most changes of a short training are smaller than half a step between two bfloat16 numbers.
            network.float().fuse_lora(adapter_names=self._adapters(role))
        network.unload_lora()
        if network.is_gradient_checkpointing:
            network.disable_gradient_checkpointing()  # its recomputation refers to the original roles
        return network

    def write_adapter(self, role: str, directory: Path) -> nn.Module:
        from peft import get_peft_model_state_dict

        layers, settings = get_peft_model_state_dict(self.network, adapter_name=role), self.network.peft_config[role]
        start = self._start_of(role)
        if start is not None:
            scales = {start: 1.0, role: settings.lora_alpha / settings.r}
            both = stacked(dict(self.network.state_dict()), scales)
            layers = {f"{layer}.lora_{kind}.weight": tensor for layer, f in both.items() for kind, tensor in f.named()}
            settings = copy.copy(settings)
            settings.r = settings.lora_alpha = len(next(iter(both.values())).a)
            settings.target_modules = set(both)
        self.family.save_lora(directory, layers, settings.to_dict())
        base: nn.Module = self.network
        return base

    @torch.no_grad()
    def copy(self, source: str, target: str) -> None:
        for mine, theirs in zip(self.parameters_of(target), self.parameters_of(source), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def _average(self, average: str, role: str, decay: float) -> None:
        get_ema_multi_avg_fn(decay)(self.parameters_of(average), self.parameters_of(role), 1)

    def checkpoint_activations(self) -> None:
        def recompute(block: nn.Module, *inputs: Any) -> Any:
            state = self._state
            contexts = lambda: (nullcontext(), self._under(*state))  # noqa: E731
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

        self.network.enable_gradient_checkpointing(recompute)

    def networks(self, *, frozen: bool = False) -> list[nn.Module]:
        return [] if frozen else [self.network]

    @contextmanager
    def _active(self, role: str, adapter_scale: float = 1.0) -> Iterator[nn.Module]:
        if role != TEACHER and role not in self.network.peft_config:
            raise KeyError(role)
        with self._under(None if role == TEACHER else role, adapter_scale):
            yield self.network

    @contextmanager
    def _under(self, role: str | None, scale: float) -> Iterator[None]:
        before = self._state
        self._activate(role, scale)
        try:
            yield
        finally:
            self._activate(*before)

    def _adapters(self, role: str | None) -> list[str]:
        """Adapters that are active in a role; none in the teacher, ``None``."""
        if role is None:
            return []
        start = self._start_of(role)
        return [role] if start is None else [start, role]

    def _activate(self, role: str | None, scale: float = 1.0) -> None:
        previous, previous_scale = self._state
        self._state = (role, scale)
        active, before = self._adapters(role), self._adapters(previous) if previous_scale != 1.0 else []
        for layer in self._layers:
            layer._active_adapter = active
            for adapter in before:
                layer.set_scale(adapter, 1.0)
            for adapter in active if scale != 1.0 else ():
                layer.set_scale(adapter, scale)


def start_name(role: str) -> str:
    """Name of the frozen adapter that a trained role started on."""
    return f"{role}@start"


def is_start(name: str) -> bool:
    """Whether a tensor belongs to a frozen adapter that a role started on."""
    return "@start." in name


def stacked(state: Mapping[str, Tensor], scales: Mapping[str, float]) -> dict[str, Factors]:
    """Sum of adapters as one, by layer: their factors side by side, so that ranks add up.

    A layer that one of them lacks has zeros there, so that all layers have the same rank.

    Args:
        state: Tensors by name, ``<layer>.lora_A.<adapter>.weight`` and likewise ``lora_B``; others are ignored.
        scales: What each adapter's product is multiplied by, ``alpha / rank``.
    """
    pairs: dict[str, dict[str, Factors]] = {}
    for name, a in state.items():
        match = re.fullmatch(r"(.+)\.lora_A\.(.+)\.weight", name)
        if match and match[2] in scales:
            b = state[name.replace(".lora_A.", ".lora_B.")].float() * scales[match[2]]
            pairs.setdefault(match[1], {})[match[2]] = Factors(a.float(), b)
    ranks = {adapter: len(f.a) for found in pairs.values() for adapter, f in found.items()}
    out: dict[str, Factors] = {}
    for layer, found in pairs.items():
        shape = next(iter(found.values()))
        parts = [found[adapter] if adapter in found else shape.zeros(rank) for adapter, rank in ranks.items()]
        out[layer] = Factors(torch.cat([f.a for f in parts]), torch.cat([f.b for f in parts], dim=1))
    return out


def _is_of(name: str, adapter: str) -> bool:
    return ".lora_" in name and f".{adapter}." in name


def _targets(family: ModelFamily, network: nn.Module, lora: LoRA) -> list[str]:
    """Names of the modules that get an adapter.

    A target given by the user must match a module. The family's own list may name modules that a smaller or older
    member of the family lacks.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    wanted = lora.targets or tuple(family.lora_targets)
    matched = {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in wanted}
    missing = [target for target in wanted if not matched[target]]
    if missing and (lora.targets or len(missing) == len(wanted)):
        raise UserError(
            f"LoRA target {missing[0]!r} matches no module of the network",
            where="model.lora.targets",
            remedy=f"use suffixes of linear layers or convolutions, such as {', '.join(family.lora_targets)}",
        )
    return sorted({name for found in matched.values() for name in found})


def _add_adapters(network: Any, lora: LoRA, targets: list[str], adapters: list[str], seed: int) -> None:
    from peft import LoraConfig

    # Without a device context, peft puts all adapters except the first on the CPU.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), next(network.parameters()).device:
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are intended
        for adapter in adapters:
            # The same on every rank, and independent of the method's other roles.
            torch.manual_seed(named_seed("adapter", seed, adapter))
            network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), adapter)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
