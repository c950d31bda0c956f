"""What reveals reward hacking and collapse: diversity, free choices, and the distribution of latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from gdmd_lightning.metrics.attributes import FreeChoices, free_choices
from gdmd_lightning.metrics.distance import frechet_distance, total_variation
from gdmd_lightning.metrics.evaluation import Generate, fixed_noise
from gdmd_lightning.metrics.intervals import Interval, Units, bootstrap
from gdmd_lightning.metrics.variety import pairwise_distance
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Count, Range, Seed, ranged
from gdmd_lightning.shapes.captions import COLORS, TASKS, evaluation_prompts
from gdmd_lightning.shapes.detector import ShapesDetector
from gdmd_lightning.shapes.scenes import render, sample_scenes
from gdmd_lightning.studies.contestants import Contestant

WATCHED = {
    "diversity": "diversity",
    "color_bias": "color bias",
    "position_bias": "position bias",
    "size_bias": "size bias",
    "latent_std": "latents' std",
    "latent_distance": "latents' distance",
}
"""Column title of each figure, by its name."""

POOLED = 2
"""Rows and columns that latents are averaged to for their distance: more would need more pictures than there are."""

_REFERENCES: dict[tuple[Watch, str], Tensor] = {}
"""Pooled latents of each teacher that a process has watched, since every run is compared with the same ones."""


@ranged
@dataclass(frozen=True)
class Watch:
    """Several samples of each of a few prompts of the Shapes world.

    The figures are ``diversity`` (mean pairwise distance between the samples of a prompt), ``color_bias``,
    ``position_bias`` and ``size_bias`` (total variation distance of the choices that prompts leave open from those of
    the world's own scenes of the same prompts), ``latent_std`` (standard deviation of the latents; compare with the
    teacher's) and ``latent_distance`` (Frechet distance of pooled latents to those of the guided teacher from other
    noise; the teacher's own is what finitely many pictures cost).

    Args:
        per_task: Prompts of each task.
        samples: Samples of each prompt.
        seed: Seed of the noise; not that of the scores.
    """

    per_task: Count = 8
    samples: Annotated[int, Range(2)] = 8
    seed: Seed = 1

    @torch.no_grad()
    def __call__(self, contestant: Contestant) -> dict[str, Interval]:
        """The figures of a generator, with 95% intervals over prompts or pictures."""
        images = self._pictures(contestant.generate, contestant.latent_shape, self.seed)
        latents = contestant.encode(images)
        distances = pairwise_distance(images.unflatten(0, (-1, self.samples))).cpu()
        mine, truth = free_choices(images, self.prompts, ShapesDetector(), COLORS), true_choices(self)
        return {
            "diversity": bootstrap([Units.single(distances.numpy())]),
            "color_bias": _choice_interval(mine.color, truth.color),
            "position_bias": _choice_interval(mine.position, truth.position),
            "size_bias": _choice_interval(mine.size, truth.size),
            "latent_std": bootstrap([Units.single(latents.flatten(1).std(1).double().cpu().numpy())]),
            "latent_distance": _distance_interval(_pooled(latents), self._reference(contestant), self.samples),
        }

    @property
    def prompts(self) -> list[Prompt]:
        """Every prompt, as often as there are samples of it."""
        return [p for p in evaluation_prompts(self.per_task) for _ in range(self.samples)]

    def _pictures(self, generate: Generate, latent_shape: tuple[int, ...], seed: int) -> Tensor:
        prompts, parts = self.prompts, []
        for start in range(0, len(prompts), len(TASKS) * self.samples):
            rows = range(start, min(start + len(TASKS) * self.samples, len(prompts)))
            noise = torch.stack([fixed_noise(i, latent_shape, seed) for i in rows])
            parts.append(generate(noise, [prompts[i].text for i in rows]))
        return torch.cat(parts)

    def _reference(self, contestant: Contestant) -> Tensor:
        key = (self, contestant.teacher)
        if key not in _REFERENCES:
            # Other noise, or the teacher would be at no distance from itself.
            images = self._pictures(contestant.reference, contestant.latent_shape, self.seed + 1)
            _REFERENCES[key] = _pooled(contestant.encode(images))
        return _REFERENCES[key]


@cache
def true_choices(watch: Watch, scenes: int = 4) -> FreeChoices:
    """The choices in ``scenes`` times as many of the world's own scenes as there are pictures, of the same prompts."""
    prompts = watch.prompts * scenes
    images = render(sample_scenes([prompt.metadata for prompt in prompts], np.random.default_rng(watch.seed)))
    return free_choices(images, prompts, ShapesDetector(), COLORS)


def _pooled(latents: Tensor) -> Tensor:
    """Latents as vectors of their local means, ``[N, 4 C]``."""
    return adaptive_avg_pool2d(latents.float(), POOLED).flatten(1).double().cpu()


def _choice_interval(counts: Tensor, truth: Tensor, resamples: int = 1000) -> Interval:
    """Distance of counts ``[N, C]`` from the truth, with a 95% bootstrap interval over rows."""
    rng: Any = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(len(counts), size=(resamples, len(counts))))
    low, high = np.quantile(total_variation(counts[rows], truth).numpy(), (0.025, 0.975))
    return Interval(float(total_variation(counts, truth)), float(low), float(high))


def _distance_interval(latents: Tensor, reference: Tensor, samples: int) -> Interval:
    """Distance to the reference, with a 95% jackknife interval over prompts.

    A bootstrap would repeat latents, which alone moves them away from the reference.
    """
    by_prompt = latents.unflatten(0, (-1, samples))
    mean = float(frechet_distance(latents, reference))
    parts = []
    for i in range(len(by_prompt)):
        others = torch.cat([by_prompt[:i], by_prompt[i + 1 :]]).flatten(0, 1)
        parts.append(float(frechet_distance(others, reference)))
    half = 1.96 * math.sqrt((len(parts) - 1) * float(np.var(parts)))
    return Interval(mean, max(mean - half, 0.0), mean + half)
