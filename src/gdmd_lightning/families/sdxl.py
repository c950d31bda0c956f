"""Stable Diffusion XL: variance-preserving UNet, two CLIP text encoders, conditioned on the image size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families import autoencoder
from gdmd_lightning.families.base import ModelFamily, Pipeline, Predict
from gdmd_lightning.families.loading import load_pipeline
from gdmd_lightning.families.resolution import Grid, autoencoder_factor
from gdmd_lightning.families.sketch import sketch_pipeline
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.schedules import per_sample, sigma_from_vp, vp_from_sigma

_EVEN = {
    "timestep_spacing": "trailing",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "final_sigmas_type": "zero",
}
"""Settings of the exported sampler that a teacher's scheduler may have otherwise; with these it visits our sigmas."""

_UNCLIPPED = {"clip_sample": False, "thresholding": False}
"""Settings of the exported stochastic sampler; the generator was trained with every ``x0`` as predicted."""


class SDXLFamily(ModelFamily):
    """Stable Diffusion XL, base models.

    Its states ``x_t = a_t x0 + s_t eps`` are converted to flow states, see :mod:`gdmd_lightning.schedules`.
    Its highest sigma is ``s_T / (a_T + s_T)``, about 0.94, because the last timestep still contains some of
    the image.

    Args:
        path: Directory or hub id of a ``StableDiffusionXLPipeline``.
        dtype: Precision of the weights: ``float32``, ``bfloat16`` or ``float16``.

    Source: SDXL (2307.01952).
    """

    pipeline_class = "StableDiffusionXLPipeline"
    network_component = "unet"
    repeated_blocks = ("BasicTransformerBlock",)

    def __init__(self, path: str, dtype: str = "float32") -> None:
        super().__init__(path)
        self.dtype = dtype

    def load(self) -> nn.Module:
        """Load all weights and the schedule.

        Raises:
            UserError: If the schedule is not variance-preserving, or the network does not predict noise or velocity,
                its times are not the timesteps, or it takes the guidance scale as an input.
        """
        from diffusers import StableDiffusionXLPipeline

        self.pipeline = load_pipeline(
            StableDiffusionXLPipeline,
            self.path,
            self.dtype,
            network=self.network_component,
            build=self.build_network,
        )
        return self._network()

    def sketch(self) -> nn.Module:
        from diffusers import StableDiffusionXLPipeline

        self.pipeline = sketch_pipeline(StableDiffusionXLPipeline, self.path, self.dtype)
        self._empty = self.blank_conditioning(torch.device("meta"))
        return self._network()

    def _network(self) -> nn.Module:
        scheduler = self.loaded.scheduler
        # Some schedulers keep the variances that they do not use.
        if not hasattr(scheduler, "alphas_cumprod") or scheduler.config.get("use_flow_sigmas"):
            raise UserError(
                f"the schedule of {type(scheduler).__name__} is not variance-preserving",
                where="family.path",
                remedy="use a model with such a schedule, as of an EulerDiscreteScheduler or a DDIMScheduler",
            )
        self.predicts = scheduler.config.prediction_type
        if self.predicts not in ("epsilon", "v_prediction"):
            raise UserError(
                f"the network predicts {self.predicts!r}, according to its scheduler",
                where="family.path",
                remedy="use a model that predicts epsilon or v_prediction",
            )
        if self.loaded.unet.config.time_cond_proj_dim is not None:
            raise UserError(
                "the UNet takes the guidance scale as an input (time_cond_proj_dim)",
                where="family.path",
                remedy="use a model that is not distilled for guidance",
            )
        # Only then does diffusers call the network with other times.
        if self.predicts == "v_prediction" and scheduler.config.get("timestep_type") == "continuous":
            raise UserError(
                "the network's times are continuous, according to its scheduler (timestep_type)",
                where="family.path",
                remedy="use a model whose times are the timesteps",
            )
        # Without a signal at the last timestep its log-ratio to noise is infinite; EulerDiscreteScheduler leaves this.
        alphas = scheduler.alphas_cumprod.double().clamp(min=2**-24)
        self.timestep_sigmas = sigma_from_vp(alphas.sqrt(), (1 - alphas).sqrt())  # [T], ascending
        return self.loaded.unet

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        encoder = self.loaded.text_encoder_2
        like = torch.empty(0, dtype=encoder.dtype, device=device)
        length, width = encoder.config.max_position_embeddings, self.loaded.unet.config.cross_attention_dim
        return Conditioning(like.new_empty(1, length, width), like.new_empty(1, encoder.config.projection_dim))

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        device = next(self.loaded.text_encoder.parameters()).device
        sequence, _, pooled, _ = self.loaded.encode_prompt(
            list(texts), device=device, do_classifier_free_guidance=False
        )
        return Conditioning(sequence, pooled)

    def token_limits(self) -> dict[str, int]:
        names = ("tokenizer", "tokenizer_2")
        parts = {name: getattr(self.loaded, name) for name in names}
        return {name: part.model_max_length for name, part in parts.items() if part is not None}

    @property
    def empty(self) -> Conditioning:
        """Conditioning of the empty prompt; zeros if the pipeline is configured so, as base models are."""
        if self._empty is None:
            empty = self.encode([""])
            if self.loaded.config.force_zeros_for_empty_prompt and empty.pooled is not None:
                empty = Conditioning(torch.zeros_like(empty.sequence), torch.zeros_like(empty.pooled))
            self._empty = empty
        return self._empty

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        # Size conditioning: the size of these latents, without a crop.
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

    def error_weight(self, sigma: Tensor) -> Tensor:
        """That of the noise, ``(1 - sigma)^2``, or of the ``v`` of variance-preserving networks."""
        noise = (1 - sigma) ** 2
        return noise + sigma**2 if self.predicts == "v_prediction" else noise

    def feature_module(self, network: Any) -> nn.Module:
        """The middle block of the UNet."""
        return network.mid_block

    def feature_width(self, network: Any) -> int:
        return int(network.config.block_out_channels[-1])

    def timestep(self, sigma: Tensor) -> Tensor:
        """Convert sigmas to the network's time.

        Between two timesteps the time is linear in the log-ratio of noise to signal. Values beyond the first
        or last timestep are clamped to it.

        Args:
            sigma: Noise levels in (0, 1), ``[B]``.

        Returns:
            Times in [0, T - 1], ``[B]``.
        """
        ratio = torch.logit(self.timestep_sigmas.to(sigma.device))
        here = torch.logit(sigma.double()).clamp(ratio[0], ratio[-1])
        above = torch.searchsorted(ratio, here).clamp(1, len(ratio) - 1)
        t = above - 1 + (here - ratio[above - 1]) / (ratio[above] - ratio[above - 1])
        # Sigmas of timesteps, rounded to single precision, map back to exactly these timesteps.
        return torch.where((t - t.round()).abs() < 0.01, t.round(), t).to(sigma.dtype)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config, factor = self.loaded.unet.config, self.loaded.vae_scale_factor
        self.grid(config, self.loaded.vae.config).check(height, width)
        return config.in_channels, height // factor, width // factor

    def grid(self, network: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> Grid:
        """Single latents; the UNet has no positions."""
        return Grid(autoencoder_factor(autoencoder["block_out_channels"]))

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.loaded.vae
        latents = latents.to(vae.dtype)
        mean, std = self._statistics(latents)
        return autoencoder.decode(vae, latents * std / vae.config.scaling_factor + mean)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.loaded.vae
        latents = autoencoder.encode(vae, images)
        mean, std = self._statistics(latents)
        return (latents - mean) * vae.config.scaling_factor / std

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of each channel of the autoencoder's latents, ``[1, C, 1, 1]``; few have any."""
        mean, std = (self.loaded.vae.config.get(name) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:  # diffusers' pipeline needs both, too
            return 0.0, 1.0
        return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """All attention projections."""
        return ("to_q", "to_k", "to_v", "to_out.0")

    def check_export(self, steps: int, *, stochastic: bool) -> None:
        timesteps = self.loaded.scheduler.config.num_train_timesteps
        if stochastic and timesteps % steps:
            raise UserError(
                f"{steps} steps do not divide {timesteps} timesteps",
                where="steps",
                remedy="use a divisor, or the ODE sampler",
            )

    def to_pipeline(
        self, network: nn.Module, steps: int, latent_shape: tuple[int, int, int], *, stochastic: bool
    ) -> Pipeline:
        """Use ``EulerDiscreteScheduler``, or ``LCMScheduler`` if stochastic, as DMD2's release does.

        ``LCMScheduler`` starts from unit noise instead of the first sigma times noise, a difference of 0.2 %;
        the images differ by as little.

        Raises:
            UserError: If ``stochastic`` and the number of steps does not divide the number of timesteps.
        """
        from diffusers import EulerDiscreteScheduler, LCMScheduler, StableDiffusionXLPipeline

        config = self.loaded.scheduler.config
        scheduler: Any
        self.check_export(steps, stochastic=stochastic)
        if stochastic:
            scheduler = LCMScheduler.from_config(config, original_inference_steps=steps, **_UNCLIPPED)
        else:
            scheduler = EulerDiscreteScheduler.from_config(config, **_EVEN)
        components = self.components(unet=network, scheduler=scheduler)
        return StableDiffusionXLPipeline(
            **components, force_zeros_for_empty_prompt=self.loaded.config.force_zeros_for_empty_prompt
        )

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Sigmas of evenly spaced timesteps: 999, 749, 499, 249 for 4 steps, as in DMD2 (2405.14867)."""
        count = len(self.timestep_sigmas)
        timesteps = (torch.arange(steps, 0, -1).double() * count / steps).round().long() - 1
        return torch.cat([self.timestep_sigmas[timesteps], torch.zeros(1)]).float()

    def teacher_scheduler(self, steps: int, latent_shape: tuple[int, int, int]) -> Any:
        scheduler = type(self.loaded.scheduler).from_config(self.loaded.scheduler.config)
        scheduler.set_timesteps(steps)
        return scheduler

    def _scheduler_output(self, predict: Predict, scheduler: Any, x: Tensor, timestep: Tensor) -> Tensor:
        """The predicted noise, or velocity of the variance-preserving process."""
        sigma = self._sigma(timestep).to(x).expand(len(x))
        a, s = (per_sample(part, x) for part in vp_from_sigma(sigma.double()))
        x_sigma = scheduler.scale_model_input(x, timestep) / (a + s)
        v = predict(x_sigma, sigma, torch.arange(len(x)))
        x0, eps = x_sigma - per_sample(sigma, x) * v, x_sigma + (1 - per_sample(sigma, x)) * v
        return a * eps - s * x0 if self.predicts == "v_prediction" else eps

    def _sigma(self, timestep: Tensor) -> Tensor:
        """The level with this :meth:`timestep`, a scalar."""
        ratio, below = torch.logit(self.timestep_sigmas), int(timestep)
        above = min(below + 1, len(ratio) - 1)
        return torch.sigmoid(torch.lerp(ratio[below], ratio[above], timestep.double().cpu() - below))
