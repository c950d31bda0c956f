"""FLUX.2 and its klein variants: rectified flow on patches of a normalised autoencoder, told by layers of an LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily, Pipeline
from gdmd_lightning.families.loading import load_pipeline
from gdmd_lightning.families.sketch import sketch_pipeline
from gdmd_lightning.latents import Conditioning


class Flux2KleinFamily(ModelFamily):
    """FLUX.2 klein, base or distilled.

    Its latents, here and in the pipeline's ``latents=``, are 2x2 patches of the autoencoder's, each channel
    normalised by the autoencoder's statistics: ``[B, 4 c, height / 16, width / 16]``.

    Args:
        path: Directory or hub id of a ``Flux2KleinPipeline``.
        max_sequence_length: Tokens a prompt is padded or cut to, as in the pipeline's call.
        text_layers: Layers of the text encoder whose states are told to the network, as in the pipeline's call.
        dtype: Weights' precision: ``float32``, ``bfloat16`` or ``float16``.

    Source: diffusers' ``Flux2KleinPipeline``; distilled in RTDMD (2605.26108).
    """

    pipeline_class = "Flux2KleinPipeline"
    told_guidance = False
    _pipeline_arguments: ClassVar[dict[str, Any]] = {"is_distilled": True}

    def __init__(
        self,
        path: str,
        max_sequence_length: int = 512,
        text_layers: tuple[int, ...] = (9, 18, 27),
        dtype: str = "float32",
    ) -> None:
        super().__init__(path)
        self.max_sequence_length, self.text_layers, self.dtype = max_sequence_length, text_layers, dtype
        self._tokens = 0

    def load(self) -> nn.Module:
        """See :meth:`ModelFamily.load`.

        Raises:
            UserError: If the text encoder has not the layers asked for, or the network is of the other kind: told
                its guidance, or not.
        """
        import diffusers

        self.pipeline = load_pipeline(getattr(diffusers, self.pipeline_class), self.path, self.dtype)
        return self._network()

    def sketch(self) -> nn.Module:
        """See :meth:`ModelFamily.sketch`."""
        import diffusers

        self.pipeline = sketch_pipeline(getattr(diffusers, self.pipeline_class), self.path, self.dtype)
        self._empty = self.blank_conditioning(torch.device("meta"))
        return self._network()

    def _network(self) -> nn.Module:
        layers = self.loaded.text_encoder.config.get_text_config().num_hidden_layers
        if max(self.text_layers) > layers:
            raise UserError(
                f"the text encoder has {layers} layers, not {max(self.text_layers)}", where="family.text_layers"
            )
        if self.loaded.transformer.config.guidance_embeds != self.told_guidance:
            raise UserError("only klein's network is not told its guidance", where="family.path")
        return self.loaded.transformer

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        """See :meth:`ModelFamily.blank_conditioning`."""
        length, width = self.max_sequence_length, self.loaded.transformer.config.joint_attention_dim
        sequence = torch.empty(1, length, width, dtype=self.loaded.text_encoder.dtype, device=device)
        return Conditioning(sequence, ids=torch.zeros(1, length, 4, dtype=torch.long, device=device))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """See :meth:`ModelFamily.encode`; ``ids`` are the tokens' positions."""
        sequence, ids = self.loaded.encode_prompt(
            list(texts),
            device=next(self.loaded.text_encoder.parameters()).device,
            max_sequence_length=self.max_sequence_length,
            text_encoder_out_layers=self.text_layers,
        )
        return Conditioning(sequence, ids=ids)

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`ModelFamily.velocity`; the network's time is ``sigma``, a latent's every place a token."""
        return self._ask(network, x_sigma, sigma, conditioning, None)

    def _ask(
        self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None
    ) -> Tensor:
        tokens = network(
            hidden_states=x_sigma.flatten(2).transpose(1, 2).to(conditioning.sequence.dtype),
            timestep=sigma,
            guidance=guidance,
            encoder_hidden_states=conditioning.sequence,
            txt_ids=conditioning.ids,
            img_ids=self.loaded._prepare_latent_ids(x_sigma).to(x_sigma.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(x_sigma.shape)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See :meth:`ModelFamily.latent_shape`; the levels of :meth:`few_step_sigmas` depend on what was asked last."""
        unit = 2 * self.loaded.vae_scale_factor
        if height % unit or width % unit or min(height, width) < unit:
            raise UserError(
                f"{height}x{width} is not a multiple of {unit} pixels",
                where="resolution",
                remedy=f"use a multiple of {unit}: autoencoder {unit // 2}, patch 2",
            )
        self._tokens = (height // unit) * (width // unit)
        return self.loaded.transformer.config.in_channels, height // unit, width // unit

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`ModelFamily.decode`."""
        vae = self.loaded.vae
        mean, std = self._statistics(latents)
        patches = self.loaded._unpatchify_latents(latents * std + mean)
        return (vae.decode(patches.to(vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See :meth:`ModelFamily.encode_images`."""
        vae = self.loaded.vae
        latents = vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode().float()
        patches = self.loaded._patchify_latents(latents)
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        norm, eps = self.loaded.vae.bn, self.loaded.vae.config.batch_norm_eps
        mean, std = norm.running_mean, torch.sqrt(norm.running_var + eps)
        return mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention of both streams, and the fused projections of the single one, as in RTDMD (2605.26108)."""
        joint = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        return (*joint, "to_qkv_mlp_proj", "to_out")

    def to_pipeline(self, network: nn.Module, steps: int, *, stochastic: bool) -> Pipeline:
        """See :meth:`ModelFamily.to_pipeline`; the pipeline's own levels in ``steps`` steps are the generator's."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            self.loaded.scheduler.config, stochastic_sampling=stochastic
        )
        components = dict(self.loaded.components, transformer=network, scheduler=scheduler)
        return type(self.loaded)(**components, **self._pipeline_arguments)

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """See :meth:`ModelFamily.few_step_sigmas`: 1, 3/4, 2/4, 1/4 under the shift that the pipeline gives to so many
        steps on so many tokens.

        Raises:
            RuntimeError: If :meth:`latent_shape` has not been asked, so that the number of tokens is not known.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        if not self._tokens:
            raise RuntimeError("latent_shape() must be asked before the levels, which depend on it")
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.loaded.scheduler.config)
        even = np.linspace(1.0, 1 / steps, steps)
        scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(self._tokens, steps))
        return scheduler.sigmas.clone()

    def teacher_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """See :meth:`ModelFamily.teacher_sigmas`."""
        return self.few_step_sigmas(steps)

    def sampling_arguments(self) -> dict[str, Any]:
        """See :meth:`ModelFamily.sampling_arguments`."""
        return {"max_sequence_length": self.max_sequence_length, "text_encoder_out_layers": self.text_layers}


class Flux2Family(Flux2KleinFamily):
    """FLUX.2, whose network is told a guidance scale and so needs no second, unconditional pass.

    Its text encoder's processor needs torchvision (``pip install gdmd_lightning[flux2]``).

    A scale of 1, which fake score and student have, is told as 1, as a call of the exported pipeline with
    ``guidance_scale=1.0`` tells it.

    Args:
        path: Directory or hub id of a ``Flux2Pipeline``.
        max_sequence_length: Tokens a prompt is padded or cut to, as in the pipeline's call.
        text_layers: Layers of the text encoder whose states are told to the network, as in the pipeline's call.
        dtype: Weights' precision: ``float32``, ``bfloat16`` or ``float16``.

    Source: diffusers' ``Flux2Pipeline``.
    """

    pipeline_class = "Flux2Pipeline"
    told_guidance = True
    guided_passes = 1
    _pipeline_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        path: str,
        max_sequence_length: int = 512,
        text_layers: tuple[int, ...] = (10, 20, 30),
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, max_sequence_length, text_layers, dtype)

    def predict_velocity(
        self,
        network: nn.Module,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The velocity, guided by telling the network the scale."""
        told = conditioning.cast(next(network.parameters()).dtype)
        guidance = torch.full_like(sigma, guidance_scale)
        return self._ask(network, x_sigma, sigma, told, guidance).to(x_sigma.dtype)

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`ModelFamily.velocity`."""
        return self._ask(network, x_sigma, sigma, conditioning, torch.ones_like(sigma))
