"""The steps of a role: what a method calls, and the script that every engine follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol

from torch import Tensor

from gdmd_lightning.phases import phase
from gdmd_lightning.roles import Roles

Backward = Callable[[Tensor], None]
"""``backward(loss)`` adds the gradient of a scalar loss to that of the learning role."""


class Learn(Protocol):
    """One optimizer step of a role.

    ``with learn("generator") as backward:`` gives the role gradient inside. Call ``backward(loss)`` as often as there
    are losses (micro-batches, timesteps); their gradients add up. On exit the gradient is clipped, the role stepped
    and its averages moved, unless the engine skips a step that is not finite. After an exception nothing is stepped.
    """

    def __call__(self, role: str) -> AbstractContextManager[Backward]:
        """Start a step of a trained role; raises ``KeyError`` for any other."""
        ...


class Engine(ABC):
    """A :class:`Learn` for one update; subclasses say how gradients are computed and applied.

    Args:
        roles: The roles of the method.
    """

    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    @contextmanager
    def __call__(self, role: str) -> Iterator[Backward]:
        with self.roles.learning(role):
            self.zero_grad(role)
            with ExitStack() as forward:
                forward.enter_context(phase(f"{role} forward"))

                def backward(loss: Tensor) -> None:
                    forward.close()
                    with phase(f"{role} backward"):
                        self.backward(loss)
                    forward.enter_context(phase(f"{role} forward"))

                yield backward
            with phase("optimizer step"):
                taken = self.step(role)
        if taken:
            self.roles.update_averages(role)

    @abstractmethod
    def zero_grad(self, role: str) -> None:
        """Drop the role's gradients."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``."""

    @abstractmethod
    def step(self, role: str) -> bool:
        """Clip the role's gradient and step its optimizer; returns whether the step was taken."""
