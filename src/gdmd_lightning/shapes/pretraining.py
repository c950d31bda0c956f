"""How the embedded pipeline's parts are trained: autoencoder, text-image scorer, and the teacher itself.

Three small LightningModules with automatic optimisation over :class:`ShapesData`; ``commands/pretrain.py`` runs
them in turn and saves a directory that ``StableDiffusion3Pipeline.from_pretrained`` loads.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from gdmd_lightning.schedules import LogitNormalLaw, draw_levels, renoise
from gdmd_lightning.shapes.captions import corrupt, describe, prompt_stream
from gdmd_lightning.shapes.scenes import render, sample_scenes


@dataclass(frozen=True)
class Pictures:
    """Rendered pictures, each with its caption and with one that errs as web captions do."""

    images: Tensor  # [N, 3, 32, 32] in [0, 1]
    captions: list[str]
    wrong: list[str]


def make_pictures(count: int, seed: int) -> Pictures:
    """Draw ``count`` training pictures with their true captions, and for each a caption wrong in one respect."""
    rng, stream = random.Random(seed), prompt_stream("train", seed)
    captions = [next(stream) for _ in range(count)]
    wrong = []
    for caption in captions:
        prefix = caption.text.removesuffix(describe(caption.metadata))
        wrong.append(prefix + describe(corrupt(caption.metadata, rng)))
    numpy_rng = np.random.default_rng(seed)
    parts = [
        render(sample_scenes([c.metadata for c in captions[i : i + 1000]], numpy_rng)) for i in range(0, count, 1000)
    ]
    return Pictures(torch.cat(parts), [caption.text for caption in captions], wrong)


def loader(*tensors: Tensor, batch_size: int) -> DataLoader[Any]:
    """Shuffled full batches of tensors in memory."""
    return DataLoader(TensorDataset(*tensors), batch_size=batch_size, shuffle=True, drop_last=True)


class _OneCycle(pl.LightningModule):
    """AdamW with one cycle of the learning rate over the whole run."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, self.learning_rate, total_steps=int(self.trainer.max_steps), pct_start=0.05
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class AutoencoderTraining(_OneCycle):
    """Trains an ``AutoencoderKL`` on pictures; the KL weight only keeps the latents bounded."""

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
    """Trains a ``CLIPModel`` contrastively; captions that are equal in a batch are all right answers."""

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
    """Flow matching of an ``SD3Transformer2DModel`` and its two text encoders on latents.

    Args:
        transformer: The velocity network.
        encoders: The two ``CLIPTextModelWithProjection``, trained with it.
        empty: Token ids of the empty prompt, ``[L]``.
        law: Law of the noise level.
        dropout: Share of captions replaced by the empty prompt, for classifier-free guidance.
        caption_noise: Share of captions replaced by wrong ones, in [0, 1].
        noise_from: Share of the training after which captions err. The world is learned from true captions, then
            the errors: a short way to a teacher that could draw what it is asked and often does not.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        encoders: tuple[torch.nn.Module, torch.nn.Module],
        empty: Tensor,
        law: LogitNormalLaw,
        learning_rate: float = 1e-3,
        dropout: float = 0.1,
        caption_noise: float = 0.3,
        noise_from: float = 0.75,
        seed: int = 0,
    ) -> None:
        super().__init__(learning_rate)
        self.transformer, self.encoders = transformer, torch.nn.ModuleList(encoders)
        self.law, self.dropout = law, dropout
        self.caption_noise, self.noise_from = caption_noise, noise_from
        self.empty = empty
        self.random = torch.Generator().manual_seed(seed)

    def training_step(self, batch: list[Tensor], batch_index: int) -> Tensor:
        latents, tokens, wrong = batch
        if self.global_step >= self.noise_from * self.trainer.max_steps:
            errs = torch.rand(len(tokens), generator=self.random) < self.caption_noise
            tokens = torch.where(errs[:, None], wrong, tokens)
        dropped = torch.rand(len(tokens), generator=self.random) < self.dropout
        tokens = torch.where(dropped[:, None], self.empty, tokens)
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in self.encoders]
        sigma = draw_levels(self.law, 1, len(latents), self.random)[0]
        eps = torch.randn(latents.shape, generator=self.random)
        velocity = self.transformer(
            hidden_states=renoise(latents, sigma, eps),
            timestep=1000 * sigma,
            encoder_hidden_states=torch.cat([out.hidden_states[-2] for out in outputs], dim=-1),
            pooled_projections=torch.cat([out.text_embeds for out in outputs], dim=-1),
        ).sample
        loss = F.mse_loss(velocity, eps - latents)
        self.log("flow_matching", loss, prog_bar=True)
        return loss
