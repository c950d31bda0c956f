"""Adversarial losses in their logistic, non-saturating form.

Source: GAN (1406.2661), section 3; for few-step generators DMD2 (2405.14867), section 4.3.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus


def gan_generator_loss(fake: Tensor) -> Tensor:
    """``mean -log sigmoid(D(fake))`` of logits ``[B]``: low where generated samples pass for real ones."""
    return softplus(-fake).mean()


def gan_discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``mean [-log sigmoid(D(real)) - log(1 - sigmoid(D(fake)))]`` of logits, ``[B]`` each."""
    return (softplus(-real) + softplus(fake)).mean()
