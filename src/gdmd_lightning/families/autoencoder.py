"""Autoencoders in the precision that they need."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Autoencoder = Any
"""A diffusers autoencoder."""


def keep_range(vae: Autoencoder) -> None:
    """Turn an autoencoder in float16 into float32 if its activations overflow float16, as its config says.

    Source: ``force_upcast`` of diffusers' ``AutoencoderKL``; bfloat16 has float32's range.
    """
    if vae.dtype == torch.float16 and _overflows(vae):
        vae.to(torch.float32)


def decode(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1], float32, of latents in the autoencoder's own scale; differentiable."""
    with _without_float16(vae, latents.device):
        decoded: Tensor = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return (decoded.float() / 2 + 0.5).clamp(0, 1)


def encode(vae: Autoencoder, images: Tensor) -> Tensor:
    """Latents in the autoencoder's own scale, float32, of images ``[B, 3, H, W]`` in [0, 1]."""
    with _without_float16(vae, images.device):
        encoded = vae.encode((images * 2 - 1).to(vae.dtype))
    # AutoencoderTiny has no distribution.
    latents: Tensor = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    return latents.float()


def _without_float16(vae: Autoencoder, device: torch.device) -> AbstractContextManager[object]:
    """Turns off a surrounding autocast to float16, if the autoencoder overflows it."""
    # Asked only where autocast can be on: there is none on the meta device, where plans are made.
    if device.type == "meta" or not _overflows(vae) or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    if torch.get_autocast_dtype(device.type) != torch.float16:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _overflows(vae: Autoencoder) -> bool:
    return bool(getattr(vae.config, "force_upcast", False))
