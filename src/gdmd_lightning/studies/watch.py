"""What reveals reward hacking and collapse: diversity, free choices, spread of latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from gdmd_lightning.metrics.evaluation import fixed_noise
from gdmd_lightning.metrics.scores import Interval, bootstrap_mean
from gdmd_lightning.metrics.variety import free_colors, pairwise_distance, unevenness
from gdmd_lightning.ranges import Count, Range, Seed, ranged
from gdmd_lightning.shapes.captions import COLORS, TASKS, evaluation_prompts
from gdmd_lightning.shapes.detector import ShapesDetector
from gdmd_lightning.studies.contestants import Contestant

WATCHED = {
    "diversity": "diversity",
    "color_bias": "color bias",
    "latent_std": "latents' std",
}
"""Column title of each figure, by its name."""


@ranged
@dataclass(frozen=True)
class Watch:
    """Several samples of each of a few prompts of the Shapes world.

    The figures are ``diversity`` (mean pairwise distance between the samples of a prompt), ``color_bias`` (how unevenly
    colors are chosen where the prompt leaves them free; the truth is even) and ``latent_std`` (standard deviation of
    the latents; compare with the teacher's).

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
        """The figures of a generator, with 95% bootstrap intervals over prompts, or pictures for the latents."""
        prompts = [p for p in evaluation_prompts(self.per_task) for _ in range(self.samples)]
        parts = []
        for start in range(0, len(prompts), len(TASKS) * self.samples):
            rows = range(start, min(start + len(TASKS) * self.samples, len(prompts)))
            noise = torch.stack([fixed_noise(i, contestant.latent_shape, self.seed) for i in rows])
            parts.append(contestant.generate(noise, [prompts[i].text for i in rows]))
        images = torch.cat(parts)
        distances = pairwise_distance(images.unflatten(0, (-1, self.samples))).cpu()
        return {
            "diversity": bootstrap_mean([distances.numpy()]),
            "color_bias": _interval(free_colors(images, prompts, ShapesDetector(), COLORS)),
            "latent_std": bootstrap_mean([contestant.encode(images).flatten(1).std(1).double().cpu().numpy()]),
        }


def _interval(counts: Tensor, resamples: int = 1000) -> Interval:
    """Unevenness of counts ``[N, C]`` with a 95% bootstrap interval over rows."""
    rng: Any = np.random.default_rng(0)
    rows = torch.from_numpy(rng.integers(len(counts), size=(resamples, len(counts))))
    low, high = np.quantile(unevenness(counts[rows]).numpy(), (0.025, 0.975))
    return Interval(float(unevenness(counts)), float(low), float(high))
