"""Heads: small networks that score features, such as a GAN's discriminator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdmd_lightning.roles.spec import Head
from gdmd_lightning.streams import named_seed


class FeatureHead(nn.Module):
    """A perceptron on every image token, averaged over the image: ``[B, tokens, D]`` to logits ``[B]``.

    DMD2's head is convolutional; tokens serve every family (ours).

    Args:
        width: ``D``.
        settings: The head's hidden width and seed.
    """

    def __init__(self, width: int, settings: Head) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(named_seed("head", settings.seed))
            self.layers = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, settings.hidden), nn.SiLU(), nn.Linear(settings.hidden, 1)
            )

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.layers(features.to(next(self.parameters()).dtype))
        return logits.mean((1, 2))
