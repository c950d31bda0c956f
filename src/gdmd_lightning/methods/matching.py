"""Distribution matching: teacher and fake score give a direction, and the fake score follows the generator.

Source: DMD (2311.18828), DMD2 (2405.14867).
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, Conditioning, NoisyLatents
from gdmd_lightning.methods.base import DistillationModule, State, weighted_sum
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.objectives.distribution_matching import dm_direction, normalizer
from gdmd_lightning.objectives.score_matching import velocity_loss
from gdmd_lightning.phases import phase
from gdmd_lightning.ranges import ranged
from gdmd_lightning.roles import Optimization, RoleSpec
from gdmd_lightning.schedules import RenoiseDistribution, draw_renoise_sigmas, draw_spread_sigmas, renoise
from gdmd_lightning.streams import BatchStream, draw_noise


@dataclass(frozen=True)
class RenoiseDraw:
    """Levels and noise to renoise samples with, ``M`` times each.

    Args:
        sigma: ``[B, M]``.
        eps: Standard normal, ``[B, M, C, H, W]``.
        guidance_sigma: Levels of the teacher's guidance, ``[B, M]``; ``None`` where it shares those of the matching.
    """

    sigma: Tensor
    eps: Tensor
    guidance_sigma: Tensor | None = None

    def select(self, rows: slice) -> RenoiseDraw:
        """The draws of the given samples."""
        guidance_sigma = None if self.guidance_sigma is None else self.guidance_sigma[rows]
        return RenoiseDraw(self.sigma[rows], self.eps[rows], guidance_sigma)

    def with_levels_of(self, rows: Tensor) -> RenoiseDraw:
        """The same noise at the levels of other samples; ``rows`` names one for each sample, ``[B]`` on the CPU."""
        rows = rows.to(self.sigma.device)
        guidance_sigma = None if self.guidance_sigma is None else self.guidance_sigma[rows]
        return replace(self, sigma=self.sigma[rows], guidance_sigma=guidance_sigma)


@dataclass(frozen=True)
class Match:
    """Predictions of teacher and fake score for renoised samples, ``N`` rows.

    Args:
        x: The samples, ``[N, C, H, W]``, detached.
        latents: The renoised samples.
        real: The teacher's guided ``x0``, ``[N, C, H, W]``; its guidance may be that of another level.
        fake: The fake score's ``x0``, ``[N, C, H, W]``.
        n: Normalizer, ``[N]``.
    """

    x: Tensor
    latents: NoisyLatents
    real: Tensor
    fake: Tensor
    n: Tensor

    @property
    def target(self) -> Tensor:
        """Implicit target ``y = x - (fake - real)``: where the distillation gradient points. ``[N, C, H, W]``.

        Source: GDMD (2604.19009), section 3; not normalized, so that it is an image.
        """
        return self.x - dm_direction(self.real, self.fake)

    @property
    def gradient(self) -> Tensor:
        """Mean magnitude of ``g = (fake - real) / n``, ``[N]``."""
        return dm_direction(self.real, self.fake).flatten(1).abs().mean(1) / self.n


@ranged
class MatchingModule(DistillationModule, ABC):
    """A method that matches the generator's distribution to the teacher's with a fake score.

    Args:
        family: The teacher's pipeline.
        matching: Settings of distribution matching.
        fake_score: The fake score's optimizer.
        distillation: Arguments of :class:`DistillationModule`.
    """

    def __init__(
        self,
        family: ModelFamily,
        matching: Matching = Matching(),
        fake_score: Optimization = Optimization(),
        **distillation: Any,
    ) -> None:
        super().__init__(family, **distillation)
        self.matching, self.fake_score = matching, fake_score

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """Generator, its average, and the fake score."""
        return (*super().role_specs(), RoleSpec("fake_score", optimizer=self.fake_score))

    @property
    def teacher_guidance(self) -> float:
        return self.matching.guidance_scale

    def sigma_min(self, state: State) -> Tensor | None:
        """Level above which each sample is matched, ``[B]`` on the CPU; ``None`` for no limit.

        Source: the sub-intervals of AC-DMD in RTDMD (2605.26108), here with ``x0`` instead of the step's own end.
        """
        return self.sigmas[state.step_index + 1] if self.matching.interval == "step" else None

    def renoise_law(self, distribution: RenoiseDistribution) -> RenoiseDistribution:
        """The configured distribution of levels as it is in this update; a method may change it over time."""
        return distribution

    def draw_renoise(self, state: State, group: int = 1, *, share_sigma: bool = False) -> RenoiseDraw:
        """Levels and noise for ``group`` matches of each sample; levels are stratified within a group.

        Args:
            state: Where the ``B`` samples were taken.
            group: ``M``.
            share_sigma: Use one level for all matches of a sample.
        """
        batch, levels = len(state.latents), 1 if share_sigma else group
        distribution, sigma_min = self.renoise_law(self.matching.renoise_distribution), self.sigma_min(state)
        sigma = draw_renoise_sigmas(distribution, batch, levels, self.stream("level"), sigma_min=sigma_min)
        eps = draw_noise((batch, group, *self.latent_shape), self.stream("renoise"), self.device)
        guidance_sigma = self._guidance_sigma(state, levels)
        if guidance_sigma is not None:
            guidance_sigma = guidance_sigma.expand(batch, group).to(eps)
        return RenoiseDraw(sigma.expand(batch, group).to(eps), eps, guidance_sigma)

    def _guidance_sigma(self, state: State, levels: int) -> Tensor | None:
        """Levels of the teacher's guidance, ``[B, levels]`` on the CPU; ``None`` for those of the matching.

        Source: Decoupled DMD (2511.22677): guidance above the generator's own level, matching over all levels.
        """
        choice = self.matching.guidance_levels
        if choice == "shared" or self.matching.guidance_scale == 1.0:
            return None
        above = self.sigmas[state.step_index] if choice == "above" else None
        rng = self.stream("guidance level")
        return draw_renoise_sigmas(self.matching.renoise_distribution, len(state.latents), levels, rng, sigma_min=above)

    @torch.no_grad()
    def match(
        self, x: Tensor, conditioning: Conditioning, draw: RenoiseDraw, scores: tuple[str, ...] = ("fake_score",)
    ) -> Match:
        """Evaluate teacher and fake score on renoised samples, in one pass each for all ``B * M`` matches.

        Args:
            x: Generator samples, ``[B, C, H, W]``.
            conditioning: ``B`` rows.
            draw: Levels and noise, ``[B, M]``.
            scores: Roles that act as the fake score: match ``j`` of each sample uses
                ``scores[j % len(scores)]``.

        Returns:
            ``B * M`` rows, grouped by sample.
        """
        batch, group = draw.sigma.shape
        x = x.detach().repeat_interleave(group, dim=0)
        sigma = draw.sigma.flatten()
        latents = NoisyLatents(renoise(x, sigma, draw.eps.flatten(0, 1)), sigma, conditioning.repeat(group))
        with phase("targets"):
            real = self._ask_teacher(x, latents, draw)
            fake = self._ask(scores, latents, torch.arange(group).repeat(batch))
        return Match(x, latents, real, fake, normalizer(x, real, self.matching.floor))

    def _ask_teacher(self, x: Tensor, latents: NoisyLatents, draw: RenoiseDraw) -> Tensor:
        """The teacher's guided ``x0``, ``[N, C, H, W]``; guidance at another level is renoised with the same noise.

        ``fake - real = (fake - c) - (w - 1)(c' - u')``; at equal levels ``c + (w - 1)(c - u)`` is the guided ``x0``.

        Source: Decoupled DMD (2511.22677).
        """
        scale = self.matching.guidance_scale
        if draw.guidance_sigma is None:
            return self.roles.x0("teacher", latents, guidance_scale=scale)
        sigma = draw.guidance_sigma.flatten()
        at_guidance = NoisyLatents(renoise(x, sigma, draw.eps.flatten(0, 1)), sigma, latents.conditioning)
        return self.roles.x0("teacher", latents) + self.roles.guidance("teacher", at_guidance, scale)

    def keep_snapshot(self, snapshots: tuple[str, ...], every: int) -> None:
        """Copy the fake score to one of the snapshot roles, in turn, if this update is due.

        Call it at the start of an update: checkpoints are saved at its end, and a resumed run must take the same
        snapshots.

        Args:
            snapshots: Names of the snapshot roles; may be empty.
            every: Updates between two snapshots.
        """
        if snapshots and self.updates % every == 0:
            self.roles.copy("fake_score", snapshots[self.updates // every % len(snapshots)])

    def _fake_score_sigma(self, distribution: RenoiseDistribution, state: State, rng: BatchStream) -> Tensor:
        """Levels at which the fake score learns, ``[B]``; over the whole interval they are stratified in the batch."""
        batch, sigma_min = len(state.latents), self.sigma_min(state)
        if sigma_min is None:
            return draw_spread_sigmas(distribution, batch, rng)
        return draw_renoise_sigmas(distribution, batch, 1, rng, sigma_min=sigma_min)[:, 0]

    def _ask(self, scores: tuple[str, ...], latents: NoisyLatents, turn: Tensor) -> Tensor:
        """``x0`` of each row from role number ``turn % len(scores)``, one pass per role."""
        if len(scores) == 1:
            return self.roles.x0(scores[0], latents)
        fake = torch.empty_like(latents.x)
        for k, role in enumerate(scores):
            rows = (turn % len(scores) == k).nonzero()[:, 0].to(latents.x.device)
            if len(rows):
                fake[rows] = self.roles.x0(role, latents.select(rows)).to(fake.dtype)
        return fake

    def train_fake_score(self, batch: Batch, state: State, x0: Tensor, learn: Learn) -> dict[str, Tensor]:
        """Flow matching of the fake score on generator samples, ``matching.fake_score_updates`` times.

        Args:
            batch: ``B`` samples.
            state: Where the generator's step started.
            x0: Samples of the generator's step, ``[B, C, H, W]``, detached.
            learn: Steps the fake score.

        Returns:
            The mean loss over the updates.

        Source: DMD2 (2405.14867), section 4.2.
        """
        logs: dict[str, Tensor] = {}
        for turn in range(self.matching.fake_score_updates):
            if self.matching.fake_score_samples == "fresh":
                state = self.rollout_state(batch, f"critic rollout {turn}")
                with torch.no_grad():
                    x0 = self.student_x0(state.latents)
            done = self.fake_score_step(batch, state, x0, turn, learn)
            weighted_sum(logs, 1 / self.matching.fake_score_updates, **done)
        return logs

    def fake_score_step(self, batch: Batch, state: State, x0: Tensor, turn: int, learn: Learn) -> dict[str, Tensor]:
        """One of the fake score's steps, the ``turn``-th of an update; returns its losses."""
        latents, eps = self.renoised_for_fake_score(batch, state, x0, turn)
        logs: dict[str, Tensor] = {}
        with learn("fake_score") as backward:
            for rows, share in self.micro_batches(len(x0)):
                loss = self.fake_score_loss(latents.select(rows), x0[rows], eps[rows])
                backward(share * loss)
                weighted_sum(logs, share, fake_score_loss=loss)
        return logs

    def fake_score_loss(self, latents: NoisyLatents, x0: Tensor, eps: Tensor) -> Tensor:
        """Mean squared error of the fake score's own prediction: of its velocity, or of the noise on SDXL, as in DMD2.

        Args:
            latents: Renoised samples, ``B`` rows.
            x0: The samples, ``[B, C, H, W]``, detached.
            eps: Their noise, ``[B, C, H, W]``.
        """
        velocity = self.roles.velocity("fake_score", latents)
        return velocity_loss(velocity, x0, eps, self.family.error_weight(latents.sigma))

    def renoised_for_fake_score(self, batch: Batch, state: State, x0: Tensor, turn: int) -> tuple[NoisyLatents, Tensor]:
        """Samples ``[B, C, H, W]`` as the fake score sees them in a turn, and their noise."""
        own = self.matching.fake_score_renoise_distribution
        distribution = self.renoise_law(own or self.matching.renoise_distribution)
        rng = self.stream("critic", turn)
        sigma = self._fake_score_sigma(distribution, state, rng).to(x0)
        eps = draw_noise(tuple(x0.shape), rng, x0.device)
        return NoisyLatents(renoise(x0, sigma, eps), sigma, batch.conditioning), eps
