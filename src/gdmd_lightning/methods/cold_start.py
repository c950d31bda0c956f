"""DMDR's cold start: easier targets first.

Source: DMDR (2511.13649), DynaDG and DynaRS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.ranges import Count, NonNegative, Positive, Whole, ranged
from gdmd_lightning.roles import LoRA
from gdmd_lightning.schedules import RenoiseDistribution, Tilted


@ranged
@dataclass(frozen=True)
class ColdStart:
    """The first updates of a run, with two ramps that fall as a cosine to plain distribution matching.

    Args:
        updates: Updates before the reward joins, at least 0.
        ramp: Updates over which both ramps fall, at least 1.
        adapter_scale: DynaDG: the real estimator is the fake score with its adapter scaled by this, falling to 0, the
            teacher. Requires adapters (``model.lora``); 0 for none.
        alpha, beta: DynaRS: quantiles of renoise levels are drawn from ``Beta(alpha, beta)``, falling to
            ``Beta(1, 1)``, the configured distribution; both above 0.

    Raises:
        UserError: If a value is out of range.

    Source: DMDR's code: 20000 and 10000 updates on SiT; adapter scales of 0.75, of the fake score's 2;
    ``Beta(4, 1.5)``.
    """

    updates: Whole = 20_000
    ramp: Count = 10_000
    adapter_scale: NonNegative = 0.25
    alpha: Positive = 4.0
    beta: Positive = 1.5

    def check_roles(self, lora: LoRA | None, matching: Matching) -> None:
        """Fail if the real estimator cannot lean toward the fake score.

        Raises:
            UserError: If roles are full copies, or guidance has levels of its own.
        """
        if self.adapter_scale > 0 and lora is None:
            raise UserError(
                "full copies are trained, so the fake score has no adapter to scale",
                where="model.cold_start.adapter_scale",
                remedy="set model.lora, or use 0",
            )
        if self.adapter_scale > 0 and matching.guidance_levels != "shared":
            raise UserError(
                f"it is {matching.guidance_levels!r}, but DynaDG takes guidance from the matching's own levels",
                where="model.matching.guidance_levels",
                remedy="use shared, or set model.cold_start.adapter_scale to 0",
            )

    def left(self, update: int) -> float:
        """How much of both ramps is left at an update, counted from 0; in [0, 1]."""
        return 0.5 * (1 + math.cos(math.pi * min(update / self.ramp, 1)))

    def scale(self, update: int) -> float:
        """Scale of the fake score's adapter in the real estimator at an update."""
        return self.adapter_scale * self.left(update)

    def tilted(self, distribution: RenoiseDistribution, update: int) -> RenoiseDistribution:
        """A distribution of renoise levels as it is at an update; itself after the ramp."""
        left = self.left(update)
        return Tilted(distribution, 1 + (self.alpha - 1) * left, 1 + (self.beta - 1) * left) if left else distribution
