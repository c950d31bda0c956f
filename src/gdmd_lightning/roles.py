"""Who is who: teacher, fake score, generator, and the averages of the generator.

Whether a role is a copy or something cleverer is decided here and nowhere else; methods say a role's name and get
its ``x0`` or velocity. Every role but the one that is learning is without gradient, always.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gdmd_lightning.families.base import Conditioning, ModelFamily
from gdmd_lightning.schedules import x0_from_velocity

Role = Literal["teacher", "fake_score", "generator", "old", "ema"]
Trainable = Literal["fake_score", "generator"]


class Roles(nn.Module):
    """Full copies of one network in its roles.

    Args:
        family: Says how a network is used.
        network: The teacher, already loaded; generator and fake score start as its copies.
        ema_decay: Of the averaged generator that is evaluated and exported.
        old_decay: Of the averaged generator that the policy objective calls old; ``None`` leaves that role out.
        snapshots: How many past states of the fake score are kept.

    Attributes:
        evaluations: Network evaluations of single latents so far, by role; a guided one counts two.
    """

    def __init__(
        self,
        family: ModelFamily,
        network: nn.Module,
        *,
        ema_decay: float,
        old_decay: float | None = None,
        snapshots: int = 0,
    ) -> None:
        super().__init__()
        self.family = family
        self.teacher = network.requires_grad_(False).eval()
        self.generator = copy.deepcopy(network)
        self.fake_score = copy.deepcopy(network)
        self.learner: Trainable | None = None
        self.ema = _average(self.generator, ema_decay)
        self.old = None if old_decay is None else _average(self.generator, old_decay)
        self.snapshots = nn.ModuleList(copy.deepcopy(network) for _ in range(snapshots))
        # Between updates too: wrappers such as DDP look once, at the start, for what they are to synchronise.
        self.generator.requires_grad_(True)
        self.fake_score.requires_grad_(True)
        self.evaluations: Counter[str] = Counter()

    def velocity(
        self,
        role: Role,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        snapshot: int = 0,
    ) -> Tensor:
        """A role's velocity ``[B, C, H, W]`` at ``x_sigma`` and levels ``sigma`` ``[B]``.

        Args:
            role: Whose. Only a role inside :meth:`learning` carries gradient.
            guidance_scale: 1 for none.
            snapshot: Of the fake score: 0 is its present state, ``s`` its ``s``-th kept one.
        """
        network = self._network(role, snapshot)
        self.evaluations[role] += len(x_sigma) * (1 if guidance_scale == 1.0 else 2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and role == self.learner and not snapshot):
            return self.family.predict_velocity(network, x_sigma, sigma, conditioning, guidance_scale)

    def x0(
        self,
        role: Role,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        snapshot: int = 0,
    ) -> Tensor:
        """A role's clean latent ``[B, C, H, W]``; arguments as in :meth:`velocity`."""
        return x0_from_velocity(
            x_sigma, self.velocity(role, x_sigma, sigma, conditioning, guidance_scale, snapshot), sigma
        )

    @contextmanager
    def learning(self, role: Trainable) -> Iterator[None]:
        """Inside, the named role alone carries gradient, and is in training mode."""
        self.learner = role
        self._network(role, 0).train()
        try:
            yield
        finally:
            self.learner = None
            self._network(role, 0).eval()

    def parameters_of(self, role: Trainable) -> list[nn.Parameter]:
        """What the role's optimizer owns."""
        return list(self._network(role, 0).parameters())

    @torch.no_grad()
    def after_generator_update(self) -> None:
        """Move the averages towards the generator."""
        self.ema.update_parameters(self.generator)
        if self.old is not None:
            self.old.update_parameters(self.generator)

    @torch.no_grad()
    def keep_snapshot(self, slot: int) -> None:
        """Store the fake score's present state in a slot, counted from 0."""
        self.snapshots[slot].load_state_dict(self.fake_score.state_dict())

    def _network(self, role: Role, snapshot: int) -> nn.Module:
        if role == "fake_score" and snapshot:
            return self.snapshots[snapshot - 1]
        match role:
            case "teacher":
                return self.teacher
            case "generator":
                return self.generator
            case "fake_score":
                return self.fake_score
            case "ema":
                return self.ema.module
            case "old":
                if self.old is None:
                    raise RuntimeError("this method keeps no old policy; give Roles an old_decay")
                return self.old.module


def _average(network: nn.Module, decay: float) -> AveragedModel:
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    average.n_averaged.fill_(1)  # its first update would otherwise take the network over whole
    return average.requires_grad_(False).eval()
