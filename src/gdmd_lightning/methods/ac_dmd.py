"""AC-DMD: each step is matched on its own sub-interval, at the transition to which it leads.

Source: stage 1 of RTDMD (2605.26108). ``methods/ambient.py`` has the pieces.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.ambient import AmbientModule
from gdmd_lightning.methods.base import Update, weighted_sum


class ACDMD(AmbientModule):
    """Ambient-consistent distribution matching distillation."""

    def update(self, batch: Batch, learn: Learn) -> Update:
        """One generator step on the transitions' matching loss, then the fake score's steps."""
        state = self.rollout_state(batch)
        s, noise = self.ends(state), self.noise(batch, "transition")
        draw, back = self.draw_renoise(state), self.noise(batch, "transition back")
        samples: list[Tensor] = []
        logs: dict[str, Tensor] = {}
        with learn("generator") as backward:
            for rows, share in self.micro_batches(len(batch)):
                latents = state.latents.select(rows)
                parts = draw.select(rows), noise[rows], back[rows]
                x_s, match, loss = self.transition_loss(latents, s[rows], *parts)
                backward(share * loss)
                samples.append(x_s.detach())
                weighted_sum(logs, share, loss=loss, gradient=match.gradient.mean(), normalizer=match.n.mean())
        return Update(logs | self.train_ambient_fake_score(batch, state, torch.cat(samples), learn))
