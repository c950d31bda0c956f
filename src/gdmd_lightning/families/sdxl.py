"""Stable Diffusion XL: a variance preserving UNet, two CLIP text encoders, the picture's size as a condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily, Pipeline
from gdmd_lightning.families.loading import load_pipeline
from gdmd_lightning.families.sketch import sketch_pipeline
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.schedules import per_sample, sigma_from_vp, vp_from_sigma


class SDXLFamily(ModelFamily):
    """Stable Diffusion XL, base models.

    Its states ``x_t = a_t x0 + s_t eps`` are seen as flow states, see :mod:`gdmd_lightning.schedules`; its levels end
    at ``s_T / (a_T + s_T)``, about 0.94, since the last timestep still holds some of the picture.

    Args:
        path: Directory or hub id of a ``StableDiffusionXLPipeline``.
        dtype: Weights' precision: ``float32``, ``bfloat16`` or ``float16``.

    Source: SDXL (2307.01952).
    """

    pipeline_class = "StableDiffusionXLPipeline"
    network_component = "unet"

    def __init__(self, path: str, dtype: str = "float32") -> None:
        super().__init__(path)
        self.dtype = dtype

    def load(self) -> nn.Module:
        """See :meth:`ModelFamily.load`.

        Raises:
            UserError: If the network predicts something else than noise or velocity.
        """
        from diffusers import StableDiffusionXLPipeline

        self.pipeline = load_pipeline(StableDiffusionXLPipeline, self.path, self.dtype)
        return self._network()

    def sketch(self) -> nn.Module:
        """See :meth:`ModelFamily.sketch`."""
        from diffusers import StableDiffusionXLPipeline

        self.pipeline = sketch_pipeline(StableDiffusionXLPipeline, self.path, self.dtype)
        self._empty = self.blank_conditioning(torch.device("meta"))
        return self._network()

    def _network(self) -> nn.Module:
        scheduler = self.loaded.scheduler
        self.predicts = scheduler.config.prediction_type
        if self.predicts not in ("epsilon", "v_prediction"):
            raise UserError(f"its scheduler says it predicts {self.predicts!r}", where="family.path")
        alphas = scheduler.alphas_cumprod.double()
        self.levels = sigma_from_vp(alphas.sqrt(), (1 - alphas).sqrt())  # of each timestep, [T], rising
        return self.loaded.unet

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        """See :meth:`ModelFamily.blank_conditioning`."""
        encoder = self.loaded.text_encoder_2
        like = torch.empty(0, dtype=encoder.dtype, device=device)
        length, width = encoder.config.max_position_embeddings, self.loaded.unet.config.cross_attention_dim
        return Conditioning(like.new_empty(1, length, width), like.new_empty(1, encoder.config.projection_dim))

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """See :meth:`ModelFamily.encode`."""
        device = next(self.loaded.text_encoder.parameters()).device
        sequence, _, pooled, _ = self.loaded.encode_prompt(
            list(texts), device=device, do_classifier_free_guidance=False
        )
        return Conditioning(sequence, pooled)

    @property
    def empty(self) -> Conditioning:
        """See :attr:`ModelFamily.empty`; zeros where the pipeline says so, as the base models do."""
        if self._empty is None:
            told = self.encode([""])
            if self.loaded.config.force_zeros_for_empty_prompt and told.pooled is not None:
                told = Conditioning(torch.zeros_like(told.sequence), torch.zeros_like(told.pooled))
            self._empty = told
        return self._empty

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See :meth:`ModelFamily.velocity`; the size told to the network is the latents', without a crop."""
        a, s = (per_sample(part, x_sigma) for part in vp_from_sigma(sigma.double()))
        x_t = (a + s) * x_sigma
        size = [side * self.loaded.vae_scale_factor for side in x_sigma.shape[2:]]
        predicted = network(
            x_t.to(conditioning.sequence.dtype),
            self.timestep(sigma),
            encoder_hidden_states=conditioning.sequence,
            added_cond_kwargs={
                "text_embeds": conditioning.pooled,
                "time_ids": x_t.new_tensor([*size, 0, 0, *size]).expand(len(x_t), -1),
            },
            return_dict=False,
        )[0].to(x_t.dtype)
        if self.predicts == "v_prediction":
            return (a * predicted + s * x_t) - (a * x_t - s * predicted)
        return predicted - (x_t - s * predicted) / a

    def timestep(self, sigma: Tensor) -> Tensor:
        """The network's time at flow levels ``[B]``, ``[B]``: linear in the log-ratio of noise to signal between its
        timesteps, at their ends beyond them.
        """
        ratio = torch.logit(self.levels.to(sigma.device))
        here = torch.logit(sigma.double()).clamp(ratio[0], ratio[-1])
        above = torch.searchsorted(ratio, here).clamp(1, len(ratio) - 1)
        t = above - 1 + (here - ratio[above - 1]) / (ratio[above] - ratio[above - 1])
        # A level that is a timestep's, but for the rounding of single precision, is meant to be that timestep.
        return torch.where((t - t.round()).abs() < 0.01, t.round(), t).to(sigma.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """See :meth:`ModelFamily.latent_shape`."""
        factor = self.loaded.vae_scale_factor
        if height % factor or width % factor or min(height, width) < factor:
            raise UserError(
                f"{height}x{width} is not a multiple of {factor} pixels",
                where="resolution",
                remedy=f"use a multiple of the autoencoder's {factor}",
            )
        return self.loaded.unet.config.in_channels, height // factor, width // factor

    def decode(self, latents: Tensor) -> Tensor:
        """See :meth:`ModelFamily.decode`."""
        vae = self.loaded.vae
        decoded = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (decoded.float() / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """See :meth:`ModelFamily.encode_images`."""
        vae = self.loaded.vae
        return vae.encode((images * 2 - 1).to(vae.dtype)).latent_dist.mode().float() * vae.config.scaling_factor

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention."""
        return ("to_q", "to_k", "to_v", "to_out.0")

    def to_pipeline(self, network: nn.Module, steps: int, *, stochastic: bool) -> Pipeline:
        """See :meth:`ModelFamily.to_pipeline`.

        Re-noising is ``LCMScheduler``'s, as DMD2's release uses it. It starts from unit noise and not from the first
        level times noise, which is 0.2 % less; the pictures differ as little.

        Raises:
            UserError: If re-noising is asked for in a number of steps that does not divide the timesteps.
        """
        from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline

        config = self.loaded.scheduler.config
        scheduler: Any
        if stochastic:
            if config.num_train_timesteps % steps:
                raise UserError(
                    f"{steps} steps do not divide {config.num_train_timesteps} timesteps",
                    where="sampler.steps",
                    remedy="use a divisor, or the ode sampler",
                )
            scheduler = LCMScheduler.from_config(config, original_inference_steps=steps)
        else:
            scheduler = EulerDiscreteScheduler.from_config(config, timestep_spacing="trailing")
        components = dict(self.loaded.components, unet=network, scheduler=scheduler)
        return StableDiffusionXLPipeline(
            **components, force_zeros_for_empty_prompt=self.loaded.config.force_zeros_for_empty_prompt
        )

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """See :meth:`ModelFamily.few_step_sigmas`: those of timesteps 999, 749, 499, 249, as in DMD2 (2405.14867)."""
        count = len(self.levels)
        timesteps = (torch.arange(steps, 0, -1).double() * count / steps).round().long() - 1
        return torch.cat([self.levels[timesteps], torch.zeros(1)]).float()

    def teacher_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """See :meth:`ModelFamily.teacher_sigmas`, under Euler steps."""
        sigmas = self._euler(steps).sigmas.double()
        return (sigmas / (1 + sigmas)).float()

    def teacher_start(self, steps: int) -> float:
        """See :meth:`ModelFamily.teacher_start`."""
        scheduler = self._euler(steps)
        return float(scheduler.init_noise_sigma / scheduler.sigmas.max())

    def _euler(self, steps: int) -> Any:
        from diffusers import EulerDiscreteScheduler

        scheduler = EulerDiscreteScheduler.from_config(self.loaded.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler
