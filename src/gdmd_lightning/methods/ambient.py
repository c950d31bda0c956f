"""Matching on sub-intervals: what AC-DMD and RTDMD share.

DMD compares clean samples at all levels, whatever the step. Here the transition ``x_s`` to which a step leads is
compared at levels above ``s = sigma_{k+1}``, and the fake score learns from ``x_s`` alone.

Source: RTDMD (2605.26108).
"""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, NoisyLatents
from gdmd_lightning.methods.base import State, weighted_sum
from gdmd_lightning.methods.matching import Match, MatchingModule, RenoiseDraw
from gdmd_lightning.methods.settings import Consistency, Matching
from gdmd_lightning.objectives.ambient import ambient_loss, ambient_renoise, consistency_loss
from gdmd_lightning.objectives.distribution_matching import dm_loss, normalizer
from gdmd_lightning.phases import phase
from gdmd_lightning.ranges import ranged
from gdmd_lightning.samplers import CPS, SDE, Sampler
from gdmd_lightning.schedules import draw_renoise_sigmas
from gdmd_lightning.streams import draw_noise

LARGEST_WEIGHT = 10.0
"""Of the fake score's loss near the start of a sub-interval. Source: RTDMD."""


@ranged
class AmbientModule(MatchingModule, ABC):
    """A method that matches the transitions of a generator's steps.

    Args:
        family: The teacher's pipeline.
        matching: Settings of distribution matching; ``interval`` must be ``step`` and ``guidance_levels`` ``shared``.
        sampler: How the generator, and both estimators from their level back to ``s``, take a step.
        consistency: The fake score's consistency term.
        matching_module: Arguments of :class:`MatchingModule`.

    Raises:
        UserError: If a setting has no meaning here.
    """

    def __init__(
        self,
        family: ModelFamily,
        matching: Matching = Matching(fake_score_updates=10, interval="step"),
        sampler: Sampler = CPS(),
        consistency: Consistency = Consistency(),
        **matching_module: Any,
    ) -> None:
        super().__init__(family, matching=matching, sampler=sampler, **matching_module)
        if (matching.interval, matching.guidance_levels) != ("step", "shared"):
            raise UserError(
                f"interval is {matching.interval!r} and guidance_levels {matching.guidance_levels!r}",
                where="model.matching",
                remedy="this method matches above the end of each step, with guidance there: use step and shared",
            )
        if isinstance(sampler, SDE):
            raise UserError("SDE steps are for many steps", where="model.sampler", remedy="use CPS, Renoise or ODE")
        if consistency.weight > 0 and not sampler.stochastic:
            raise UserError(
                f"{type(sampler).__name__} is deterministic, so two transitions are never independent",
                where="model.sampler",
                remedy="use CPS, or set model.consistency.weight to 0",
            )
        self.consistency = consistency

    def build_roles(self, network: nn.Module) -> None:
        super().build_roles(network)
        highest = float(self.matching.renoise_distribution.quantile(torch.ones(1)))
        if self.steps > 1 and highest <= float(self.sigmas[1]):
            raise UserError(
                f"its highest level {highest:.3g} is not above {float(self.sigmas[1]):.3g}, where the first step ends",
                where="model.matching.renoise_distribution",
                remedy="raise its upper limit",
            )

    def transition(self, latents: NoisyLatents, v: Tensor, s: Tensor, noise: Tensor) -> Tensor:
        """One step of the sampler from ``latents`` with velocity ``v`` to levels ``s`` ``[B]``; ``[B, C, H, W]``."""
        return self.sampler.step(latents.x, v, latents.sigma, s, noise, 0.0).sample

    def generator_transition(self, latents: NoisyLatents, s: Tensor, noise: Tensor) -> Tensor:
        """The generator's ``x_s``, with gradient while it is learning."""
        return self.transition(latents, self.roles.velocity("generator", latents), s, noise)

    @torch.no_grad()
    def match_transition(self, x_s: Tensor, s: Tensor, at: NoisyLatents, noise: Tensor) -> Match:
        """Step teacher and fake score from ``at`` back to ``s`` with the same noise, and compare them with ``x_s``."""
        scale = self.matching.guidance_scale
        with phase("targets"):
            real = self.transition(at, self.roles.velocity("teacher", at, guidance_scale=scale), s, noise)
            fake = self.transition(at, self.roles.velocity("fake_score", at), s, noise)
        x_s = x_s.detach()
        return Match(x_s, at, real, fake, normalizer(x_s, real, self.matching.floor))

    def transition_loss(
        self, latents: NoisyLatents, s: Tensor, draw: RenoiseDraw, noise: Tensor, back: Tensor
    ) -> tuple[Tensor, Match, Tensor]:
        """The generator's ``x_s`` with gradient, how it matches, and the loss of distribution matching.

        Args:
            latents: Where the step starts, ``B`` rows.
            s: Where it ends, ``[B]``.
            draw: Levels above ``s`` and noise, ``[B, 1]``.
            noise: Of the generator's step, ``[B, C, H, W]``.
            back: Of both estimators' step back to ``s``, ``[B, C, H, W]``.
        """
        x_s, t = self.generator_transition(latents, s, noise), draw.sigma[:, 0]
        x_t = ambient_renoise(x_s.detach(), s, t, draw.eps[:, 0])
        match = self.match_transition(x_s, s, NoisyLatents(x_t, t, latents.conditioning), back)
        return x_s, match, dm_loss(x_s, match.target, match.n)

    def train_ambient_fake_score(self, batch: Batch, state: State, x_s: Tensor, learn: Learn) -> dict[str, Tensor]:
        """Ambient matching of the fake score on transitions, ``matching.fake_score_updates`` times.

        Args:
            batch: ``B`` samples.
            state: Where the generator's step started.
            x_s: Where it ended, ``[B, C, H, W]``, detached.
            learn: Steps the fake score.

        Returns:
            Mean losses over the updates.
        """
        distribution = self.matching.fake_score_renoise_distribution or self.matching.renoise_distribution
        updates, logs = self.matching.fake_score_updates, dict[str, Tensor]()
        for turn in range(updates):
            if self.matching.fake_score_samples == "fresh":
                state = self.rollout_state(batch, f"critic rollout {turn}")
                noise = self.noise(batch, f"critic transition {turn}")
                with torch.no_grad():
                    x_s = self.generator_transition(state.latents, self.ends(state), noise)
            rng, s = self.stream("critic", turn), self.ends(state)
            t = draw_renoise_sigmas(distribution, len(batch), 1, rng, sigma_min=self.sigma_min(state))[:, 0].to(x_s)
            eps = draw_noise(tuple(x_s.shape), rng, x_s.device)
            at = NoisyLatents(ambient_renoise(x_s, s, t, eps), t, batch.conditioning)
            lower, noises = self.consistency.draw(t, x_s, self.stream("consistency", turn))
            with learn("fake_score") as backward:
                for rows, share in self.micro_batches(len(batch)):
                    part = at.select(rows)
                    v = self.roles.velocity("fake_score", part)
                    weight = self.family.error_weight(t[rows])
                    matching = ambient_loss(v, x_s[rows], s[rows], t[rows], eps[rows], LARGEST_WEIGHT, weight)
                    consistency = self._consistency(part, v, lower[rows], [noise[rows] for noise in noises])
                    backward(share * (matching + self.consistency.weight * consistency))
                    weighted_sum(logs, share / updates, fake_score_loss=matching, consistency_loss=consistency)
        return logs

    def _consistency(self, at: NoisyLatents, v: Tensor, lower: Tensor, noises: list[Tensor]) -> Tensor:
        """The fake score's clean latents against those after one step down; 0 without the term. The step is frozen."""
        if self.consistency.weight == 0:
            return torch.zeros_like(v[0, 0, 0, 0])
        after = []
        for noise in noises:
            x = self.transition(at, v.detach(), lower, noise)
            after.append(self.roles.x0("fake_score", NoisyLatents(x, lower, at.conditioning)))
        return consistency_loss(at.x0(v), after[0], after[1])

    def ends(self, state: State) -> Tensor:
        """``s``, the level at which each sample's step ends, ``[B]``."""
        return self.sigmas[state.step_index + 1].to(state.latents.x)

    def noise(self, batch: Batch, purpose: str) -> Tensor:
        """Standard normal noise of this purpose for a batch of ``B``, ``[B, C, H, W]``."""
        return draw_noise((len(batch), *self.latent_shape), self.stream(purpose), self.device)
