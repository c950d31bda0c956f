"""Roles as LoRA adapters on one network: one base in memory, an adapter a role, the teacher without any.

peft's own ``set_adapter`` is not used to switch between roles: it turns ``requires_grad`` of all others off, so that
a forward of the fake score between the generator's forward and its backward leaves the generator without gradient;
and with gradient checkpointing the blocks are computed anew under whatever adapter is active by then, which gives
wrong gradients without a word. Here a role is active only within its own forward, and a checkpointed block is
computed anew under the role that it was computed under.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.roles.base import Role, Roles, Trainable


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters instead of full weights.

    Args:
        rank: Of the two factors.
        alpha: Scale; the adapter's product is multiplied by ``alpha / rank``.
        targets: Ends of the names of the modules that get one; the family's own choice if empty.

    Source: LoRA (2106.09685); rank 32, alpha 64 as in RTDMD (2605.26108).
    """

    rank: int = 32
    alpha: int = 64
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(
                f"rank is {self.rank} and alpha {self.alpha}", where="model.lora", remedy="both must be above 0"
            )


class AdapterRoles(Roles):
    """One network, with an adapter for each role but the teacher.

    The network stays in evaluation mode: none of the families' networks trains with dropout, and one module cannot be
    in both modes between a forward and the backward that computes it anew. Adapters are float32 whatever the
    network's precision, since their updates are too small for bfloat16.

    Args:
        family: Says how a network is used.
        network: A diffusers model, already loaded; it is the teacher while no adapter is active.
        lora: Of every adapter.
        ema_decay: Of the averaged generator that is evaluated and exported.
        old_decay: Of the averaged generator that the policy objective calls old; ``None`` leaves that role out.
        snapshots: How many past states of the fake score are kept.
        seed: Of the adapters' first weights; each starts as no change at all.

    Raises:
        UserError: If a LoRA target matches no module of the network.
    """

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        *,
        lora: LoRA,
        ema_decay: float,
        old_decay: float | None = None,
        snapshots: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(family, old=old_decay is not None, snapshots=snapshots)
        self.network: Any = network.requires_grad_(False).eval()
        self._decays = {"ema": ema_decay} | ({} if old_decay is None else {"old": old_decay})
        trained: tuple[Trainable, ...] = ("generator", "fake_score")
        adapters = [*trained, *self._decays, *(f"snapshot{slot}" for slot in range(snapshots))]
        self._layers = _add_adapters(self.network, lora, _targets(family, network, lora), adapters, seed)
        self._active: str | None = None
        self._activate(None)
        for adapter in adapters:
            for parameter in self._tensors(adapter):
                parameter.requires_grad_(adapter in trained)
        for adapter in adapters[2:]:
            self._copy("generator" if adapter in self._decays else "fake_score", adapter)

    def parameters_of(self, role: Trainable) -> list[nn.Parameter]:
        """See :meth:`Roles.parameters_of`."""
        return self._tensors(role)

    def names_of(self, role: Role) -> list[str]:
        """See :meth:`Roles.names_of`."""
        return [name for name, _ in self.named_parameters() if _is_of(name, role)]

    def is_teachers(self, name: str) -> bool:
        """See :meth:`Roles.is_teachers`."""
        return ".lora_" not in name

    def standing_alone(self, role: Role) -> nn.Module:
        """See :meth:`Roles.standing_alone`; a copy whose weights have taken the adapter's product up."""
        network: Any = copy.deepcopy(self.network)
        if role != "teacher":
            network.fuse_lora(adapter_names=[role])
        network.unload_lora()
        if network.is_gradient_checkpointing:
            network.disable_gradient_checkpointing()  # its way of computing anew is that of the roles left behind
        return network

    def lora_of(self, role: Role) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """A role's adapter as peft saves it: its tensors by name, and its configuration."""
        from peft import get_peft_model_state_dict

        config = self.network.peft_config[role].to_dict()
        return get_peft_model_state_dict(self.network, adapter_name=role), config

    @torch.no_grad()
    def after_generator_update(self) -> None:
        """See :meth:`Roles.after_generator_update`."""
        for average, decay in self._decays.items():
            get_ema_multi_avg_fn(decay)(self._tensors(average), self._tensors("generator"), 1)

    def keep_snapshot(self, slot: int) -> None:
        """See :meth:`Roles.keep_snapshot`."""
        self._copy("fake_score", f"snapshot{slot}")

    def restart_old(self) -> None:
        """See :meth:`Roles.restart_old`."""
        if self.has_old:
            self._copy("generator", "old")

    def checkpoint_activations(self) -> None:
        """See :meth:`Roles.checkpoint_activations`."""

        def anew(block: nn.Module, *inputs: Any) -> Any:
            adapter = self._active
            contexts = lambda: (nullcontext(), self._under(adapter))  # noqa: E731
            return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)

        self.network.enable_gradient_checkpointing(anew)

    @contextmanager
    def _speaking(self, role: Role, snapshot: int = 0) -> Iterator[nn.Module]:
        adapter = None if role == "teacher" else f"snapshot{snapshot - 1}" if snapshot else role
        with self._under(adapter):
            yield self.network

    @contextmanager
    def _under(self, adapter: str | None) -> Iterator[None]:
        before = self._active
        self._activate(adapter)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, adapter: str | None) -> None:
        self._active = adapter
        for layer in self._layers:
            layer._active_adapter = [] if adapter is None else [adapter]

    def _tensors(self, adapter: str) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.network.named_parameters() if _is_of(name, adapter)]

    @torch.no_grad()
    def _copy(self, source: str, target: str) -> None:
        for mine, theirs in zip(self._tensors(target), self._tensors(source), strict=True):
            mine.copy_(theirs)


def _is_of(name: str, adapter: str) -> bool:
    return ".lora_" in name and f".{adapter}." in name


def _targets(family: ModelFamily, network: nn.Module, lora: LoRA) -> list[str]:
    """Names of the modules that get an adapter; a target of the user's that matches none is a mistake.

    The family's own list may name modules that a smaller or older member of the family lacks.
    """
    names = [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    wanted = lora.targets or tuple(family.lora_targets)
    matched = {target: [n for n in names if n == target or n.endswith(f".{target}")] for target in wanted}
    missing = [target for target in wanted if not matched[target]]
    if missing and (lora.targets or len(missing) == len(wanted)):
        raise UserError(
            f"LoRA target {missing[0]!r} matches no module of the network",
            where="model.lora.targets",
            remedy=f"name ends of linear layers or convolutions, as the family does: {', '.join(family.lora_targets)}",
        )
    return sorted({name for found in matched.values() for name in found})


def _add_adapters(network: Any, lora: LoRA, targets: list[str], adapters: list[str], seed: int) -> tuple[Any, ...]:
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

    # peft leaves all adapters but the first on the CPU unless the network's device is everybody's.
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), next(network.parameters()).device:
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several adapters are the idea
        torch.manual_seed(seed)  # every rank's the same, and whatever was drawn before
        for adapter in adapters:
            network.add_adapter(LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets), adapter)
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
    return tuple(module for module in network.modules() if isinstance(module, LoraLayer))
