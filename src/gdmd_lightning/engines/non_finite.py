"""Steps whose loss or gradient is not finite: they end training, or are skipped and counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.ranges import Count, ranged


@ranged
@dataclass(frozen=True)
class NonFinite:
    """What happens if the loss or gradient of an optimizer step is NaN or infinite.

    Args:
        policy: ``stop``: training ends with an error, and no checkpoint of such a step is written. ``skip``: the step
            is not taken, so that weights, moments and averages stay as they are, and training goes on. To decide, it
            waits for the device in every step.
        limit: Consecutive steps of a role that may be skipped; one more ends training.
    """

    policy: Literal["stop", "skip"] = "stop"
    limit: Count = 10


@dataclass(frozen=True)
class Attempt:
    """An optimizer step before it is taken.

    Args:
        role: Whose step it is.
        update: Number of the update, from 1.
        prompts: Texts of the update's prompts.
        loss: Sum of the step's losses, a scalar.
        norm: Gradient norm before clipping, a scalar.
    """

    role: str
    update: int
    prompts: tuple[str, ...]
    loss: Tensor
    norm: Tensor

    @property
    def finite(self) -> Tensor:
        """Whether loss and gradient are finite, a scalar on the device."""
        return torch.isfinite(self.norm) & torch.isfinite(self.loss).to(self.norm.device)

    @property
    def waits(self) -> bool:
        """Whether reading the result would wait for a device."""
        return self.norm.device.type != "cpu"

    def error(self, streak: int) -> UserError:
        """What to tell the user; ``streak`` is the number of consecutive steps that were skipped before."""
        loss, norm = float(self.loss), float(self.norm)
        texts = list(dict.fromkeys(self.prompts))
        more = f" and {len(texts) - 2} more" if len(texts) > 2 else ""
        after = f", after {streak} skipped steps in a row" if streak else ""
        where_else = " (it is finite on this rank)" if bool(self.finite) else ""
        return UserError(
            f"loss {loss:g} and gradient norm {norm:g} in update {self.update}{after}{where_else}, with prompts "
            f"{', '.join(repr(text) for text in texts[:2])}{more}",
            where=f"role {self.role!r}",
            remedy="no checkpoint of it is written; lower the role's learning rate, check reward and prompts, "
            "or set model.non_finite.policy to skip" + (" with a larger limit" if streak else ""),
        )


class StepGuard:
    """Decides whether steps may be taken.

    With ``stop``, steps on an accelerator are judged later, by :meth:`settle`, so that nothing waits for the device:
    until then only weights in memory are wrong, and a checkpoint is not written before :meth:`settle`.

    Args:
        settings: The policy.
        agree: Whether all ranks are given true; all of them must call it.

    Attributes:
        waiting: Steps taken but not judged yet.
    """

    def __init__(self, settings: NonFinite, agree: Callable[[bool], bool] = bool) -> None:
        self.settings, self.agree = settings, agree
        self.waiting: list[Attempt] = []
        self._streak: Counter[str] = Counter()

    def allows(self, attempt: Attempt) -> bool:
        """Whether the step may be taken.

        Raises:
            UserError: If it is not finite and training must end.
        """
        if self.settings.policy == "stop" and attempt.waits:
            self.waiting.append(attempt)
            return True
        if self.agree(bool(attempt.finite)):
            del self._streak[attempt.role]
            return True
        streak = self._streak.pop(attempt.role, 0)
        if self.settings.policy == "stop" or streak >= self.settings.limit:
            raise attempt.error(streak)
        self._streak[attempt.role] = streak + 1
        return False

    def settle(self) -> None:
        """Judge the steps that are waiting.

        Raises:
            UserError: If one was not finite.
        """
        waiting, self.waiting = self.waiting, []
        if waiting and not self.agree(bool(torch.stack([attempt.finite for attempt in waiting]).all())):
            raise next((attempt for attempt in waiting if not attempt.finite), waiting[0]).error(0)
