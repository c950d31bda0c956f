"""Diversity and spread of latents of the few-step generator's averaged weights, while it trains."""

from __future__ import annotations

from typing import Annotated

import lightning.pytorch as pl
import torch

from gdmd_lightning.callbacks.evaluation import log_figures
from gdmd_lightning.data.evaluation_prompts import COLUMN, SPLIT, read_evaluation_prompts
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.metrics.evaluation import fixed_noise
from gdmd_lightning.metrics.variety import pairwise_distance
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.ranges import Count, Range, Seed, ranged


@ranged
class GenerationVariety(pl.Callback):
    """Logs ``variety/diversity`` and ``variety/latent_std`` of several samples of each of a few prompts.

    Diversity is the mean distance between samples of one prompt, see :func:`pairwise_distance`; the standard deviation
    is that of the encoded pictures, over each latent.

    Args:
        prompts: ``shapes``, or a prompt file as the data module reads it.
        count: Number of prompts.
        samples: Samples of each prompt, made at once.
        every_n_updates: Updates between two measurements.
        seed: Seed of the noise.
        column, split, tag: As of :class:`GenerationEvaluation`; with a tag, the prompts are spread over the whole set.
    """

    def __init__(
        self,
        prompts: str = "shapes",
        count: Count = 12,
        samples: Annotated[int, Range(2)] = 8,
        every_n_updates: Count = 100,
        seed: Seed = 1,
        column: str = COLUMN,
        split: str = SPLIT,
        tag: str | None = None,
    ) -> None:
        self.prompts = read_evaluation_prompts(prompts, count, column=column, split=split, tag=tag)
        self.samples, self.every_n_updates, self.seed = samples, every_n_updates, seed

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Measure when due."""
        assert isinstance(pl_module, DistillationModule)
        if pl_module.updates % self.every_n_updates == 0:
            self.run(trainer, pl_module)

    @torch.no_grad()
    def run(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        """Measure now; each rank takes every ``world_size``-th prompt."""
        # Diversity, spread, prompts; in float64, so that the number of ranks does not show.
        sums = torch.zeros(3, dtype=torch.float64, device=module.device)
        with module.roles.lockstep("ema"):
            for row in range(trainer.global_rank, len(self.prompts), trainer.world_size):
                numbers = range(row * self.samples, (row + 1) * self.samples)
                noise = torch.stack([fixed_noise(i, module.latent_shape, self.seed) for i in numbers])
                images = module.generate(noise.to(module.device), [self.prompts[row].text] * self.samples)
                spread = module.family.encode_images(images).flatten(1).float().std(1).mean()
                sums += torch.stack([pairwise_distance(images[None]).float().mean(), spread, torch.ones_like(spread)])
        if trainer.world_size > 1:
            sums = trainer.strategy.reduce(sums, reduce_op="sum")
        diversity, latent_std = (sums[:2] / sums[2]).unbind()
        log_figures(trainer, module, {"variety/diversity": diversity, "variety/latent_std": latent_std})
