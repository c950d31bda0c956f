"""DMD without images (DMD2's backward simulation and two time scales): the distillation that GDMD builds on.

Source: DMD (2311.18828), DMD2 (2405.14867).
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import Update, weighted_sum
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.ranks import std


class DMD(MatchingModule):
    """Distribution matching distillation into a few-step generator."""

    def update(self, batch: Batch, learn: Learn) -> Update:
        """One generator step on the distribution-matching loss, then the fake score's steps."""
        state = self.rollout_state(batch)
        draw = self.draw_renoise(state)
        samples: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        with learn("generator") as backward:
            for rows, share in self.micro_batches(len(batch)):
                latents = state.latents.select(rows)
                x = self.student_x0(latents)
                match = self.match(x, latents.conditioning, draw.select(rows))
                loss = dm_loss(x, match.target, match.n)
                backward(share * loss)
                samples.append(x.detach())
                clamped = (match.n <= self.matching.floor).float().mean()
                weighted_sum(
                    logs, share, loss=loss, gradient=match.gradient.mean(), normalizer=match.n.mean(), clamped=clamped
                )
        x0 = torch.cat(samples)
        logs["sample_std"] = std(x0)
        return Update(logs | self.train_fake_score(batch, state, x0, learn))
