"""DMD without images (DMD2's backward simulation and two time scales): the distillation that the rest builds on.

Source: DMD (2311.18828), DMD2 (2405.14867).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd_lightning.families.base import Conditioning
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.schedules import draw_levels


class DMD(DistillationModule):
    """Distribution matching distillation into a few-step generator."""

    def generator_loss(
        self, batch: PromptBatch, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See :meth:`DistillationModule.generator_loss`."""
        state = self.rollout_state(batch, conditioning)
        x = self.student_x0(state, conditioning)
        level = draw_levels(self.matching.law, len(x), 1, self.stream("level"), stratify=False)
        targets = self.implicit_targets(x, conditioning, level, torch.zeros(1, dtype=torch.long))
        y, n = targets.y[:, 0], targets.n[:, 0]
        loss = dm_loss(x, y, n)
        gradient = (x.detach() - y).flatten(1).abs().mean(1) / n
        clamped = (n <= self.matching.floor).float().mean()
        return loss, x, {"gradient": gradient.mean(), "normaliser": n.mean(), "clamped": clamped}
