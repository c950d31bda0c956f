"""Training of the embedded pipeline's parts: autoencoder, text-image scorer and teacher.

Three small LightningModules with automatic optimization. ``studies/shapes_teacher.py`` runs them in turn and saves
a directory that ``StableDiffusion3Pipeline.from_pretrained`` loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gdmd_lightning.schedules import LogitNormal, draw_spread_sigmas, renoise
from gdmd_lightning.shapes.captions import corrupt, describe, prompt_at
from gdmd_lightning.shapes.scenes import render, sample_scenes
from gdmd_lightning.streams import python_stream


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures, each with its true caption and a wrong one.

    Args:
        images: ``[N, 3, 32, 32]`` in [0, 1].
        captions: The true caption of each picture.
        wrong: A caption of each picture with one error, like those in web captions.
    """

    images: Tensor
    captions: list[str]
    wrong: list[str]


def make_pictures(count: int, seed: int) -> Pictures:
    """Draw ``count`` training pictures; only prompts of the training split occur."""
    captions = [prompt_at("train", seed, row) for row in range(count)]
    rng, wrong = python_stream("wrong captions", seed), []
    for caption in captions:
        prefix = caption.text.removesuffix(describe(caption.metadata))
        wrong.append(prefix + describe(corrupt(caption.metadata, rng)))
    numpy_rng = np.random.default_rng(seed)
    parts = [
        render(sample_scenes([c.metadata for c in captions[i : i + 1000]], numpy_rng)) for i in range(0, count, 1000)
    ]
    return Pictures(torch.cat(parts), [caption.text for caption in captions], wrong)


def loader(*tensors: Tensor, batch_size: int) -> DataLoader[Any]:
    """Iterate over tensors in memory in shuffled batches; an incomplete last batch is dropped."""
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True, drop_last=True)


class _OneCycle(pl.LightningModule):
    """AdamW with a one-cycle learning rate over the whole run."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        steps, warmup = int(self.trainer.max_steps), 0.05
        if steps * warmup == 1:  # torch divides by the steps from the first one to the end of the warmup
            warmup += 0.001
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=steps, pct_start=warmup
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AutoencoderTraining(_OneCycle):
    """Trains an ``AutoencoderKL`` on pictures; the small KL weight only keeps the latents bounded."""

    def __init__(self, vae: torch.nn.Module, learning_rate: float = 3e-3, kl_weight: float = 1e-6) -> None:
        super().__init__(learning_rate)
        self.vae: Any = vae
        self.kl_weight = kl_weight

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        images = batch[0] * 2 - 1
        posterior = self.vae.encode(images).latent_dist
        decoded = self.vae.decode(posterior.sample()).sample
        error = F.mse_loss(decoded, images) + 0.1 * F.l1_loss(decoded, images)
        self.log("reconstruction", error, prog_bar=True)
        return error + self.kl_weight * posterior.kl().mean()


class ScorerTraining(_OneCycle):
    """Trains a ``CLIPModel`` contrastively; all copies of a caption in a batch count as correct matches."""

    def __init__(self, clip: torch.nn.Module, learning_rate: float = 1e-3) -> None:
        super().__init__(learning_rate)
        self.clip = clip

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        images, tokens = batch
        images = (images * 2 - 1) + 0.05 * torch.randn_like(images)
        logits = self.clip(input_ids=tokens, pixel_values=images).logits_per_image
        same = (tokens[:, None] == tokens[None]).all(-1).float()
        target = same / same.sum(1, keepdim=True)
        loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
        self.log("contrastive", loss, prog_bar=True)
        return loss


class TeacherTraining(_OneCycle):
    """Trains an ``SD3Transformer2DModel`` and its two text encoders with flow matching on latents.

    Args:
        transformer: The velocity network.
        encoders: The two ``CLIPTextModelWithProjection``, trained jointly with the transformer.
        empty: Token ids of the empty prompt, ``[L]``.
        distribution: Distribution of the noise level.
        learning_rate: Largest learning rate of the cycle.
        dropout: Share of captions replaced by the empty prompt, for classifier-free guidance.
        caption_noise: Share of captions replaced by wrong ones, in [0, 1].
        noise_from: Share of training after which wrong captions occur, in [0, 1]. The teacher first learns
            from true captions and then learns the errors. This quickly gives a teacher that can draw what a
            prompt asks for but often does not.
        seed: Seed of caption errors, dropout and noise.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        encoders: tuple[torch.nn.Module, torch.nn.Module],
        empty: Tensor,
        distribution: LogitNormal,
        learning_rate: float = 1e-3,
        dropout: float = 0.1,
        caption_noise: float = 0.3,
        noise_from: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate)
        self.transformer = transformer
        self.encoders = torch.nn.ModuleList(encoders)
        self.empty = empty
        self.distribution = distribution
        self.dropout = dropout
        self.caption_noise = caption_noise
        self.noise_from = noise_from
        self.rng = torch.Generator().manual_seed(seed)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        latents, tokens, wrong = batch
        if self.global_step >= self.noise_from * self.trainer.max_steps:
            noisy = torch.rand(len(tokens), generator=self.rng) < self.caption_noise
            tokens = torch.where(noisy[:, None], wrong, tokens)
        dropped = torch.rand(len(tokens), generator=self.rng) < self.dropout
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        sigma = draw_spread_sigmas(self.distribution, len(latents), self.rng)
        eps = torch.randn(latents.shape, generator=self.rng)
        velocity = self.transformer(
            hidden_states=renoise(latents, sigma, eps),
            timestep=1000 * sigma,
            encoder_hidden_states=torch.cat([out.hidden_states[-2] for out in outputs], dim=-1),
            pooled_projections=torch.cat([out.text_embeds for out in outputs], dim=-1),
        ).sample
        loss = F.mse_loss(velocity, eps - latents)
        self.log("flow_matching", loss, prog_bar=True)
        return loss
