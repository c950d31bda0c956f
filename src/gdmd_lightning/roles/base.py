"""What methods may ask of roles, however these are kept.

Every role but the one that is learning is without gradient, always.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from gdmd_lightning.families.base import Conditioning, ModelFamily
from gdmd_lightning.schedules import x0_from_velocity

Role = Literal["teacher", "fake_score", "generator", "old", "ema"]
Trainable = Literal["fake_score", "generator"]


class Roles(nn.Module, ABC):
    """Teacher, fake score, generator and the generator's averages.

    Args:
        family: Says how a network is used.
        old: Whether there is an old policy.
        snapshots: How many past states of the fake score are kept.

    Attributes:
        evaluations: Network evaluations of single latents so far, by role; a guided one counts as many as the family
            makes for it, two as a rule.
        learner: The role inside :meth:`learning`, if any.
    """

    def __init__(self, family: ModelFamily, *, old: bool, snapshots: int) -> None:
        super().__init__()
        self.family, self.has_old, self.slots = family, old, snapshots
        self.learner: Trainable | None = None
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
        if role == "old" and not self.has_old:
            raise RuntimeError("this method keeps no old policy; give its roles an old_decay")
        self.evaluations[role] += len(x_sigma) * (1 if guidance_scale == 1.0 else self.family.guided_passes)
        learns = torch.is_grad_enabled() and role == self.learner and not snapshot
        with self._speaking(role, snapshot) as network, torch.set_grad_enabled(learns):
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
        """Inside, the named role alone carries gradient, and is in training mode where it has one of its own."""
        self.learner = role
        self._train(role, True)
        try:
            yield
        finally:
            self.learner = None
            self._train(role, False)

    def _train(self, role: Trainable, mode: bool) -> None:
        """Put the role's own network, if it has one, into training mode or out of it."""

    @abstractmethod
    def _speaking(self, role: Role, snapshot: int = 0) -> AbstractContextManager[nn.Module]:
        """Inside, the network that is given speaks for the role."""

    @abstractmethod
    def parameters_of(self, role: Trainable) -> list[nn.Parameter]:
        """What the role's optimizer owns."""

    @abstractmethod
    def names_of(self, role: Role) -> list[str]:
        """Names of the role's own tensors in :meth:`state_dict`."""

    @abstractmethod
    def is_teachers(self, name: str) -> bool:
        """Whether a tensor of :meth:`state_dict` is the teacher's, which never changes and comes from its pipeline."""

    @abstractmethod
    def standing_alone(self, role: Role) -> nn.Module:
        """A network that is the role and nothing else, with the modules of the teacher's class, to be exported."""

    @abstractmethod
    def after_generator_update(self) -> None:
        """Move the averages towards the generator."""

    @abstractmethod
    def keep_snapshot(self, slot: int) -> None:
        """Store the fake score's present state in a slot, counted from 0."""

    @abstractmethod
    def restart_old(self) -> None:
        """Let the old policy be the present generator."""

    @abstractmethod
    def checkpoint_activations(self) -> None:
        """Let the trainable roles compute their activations anew in the backward pass instead of keeping them."""
