"""Stable Diffusion 3 and 3.5: rectified flow, MMDiT, two CLIP text encoders and an optional T5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families import autoencoder
from gdmd_lightning.families.base import ModelFamily, Pipeline
from gdmd_lightning.families.loading import check_flow_scheduler, load_pipeline
from gdmd_lightning.families.resolution import Grid, autoencoder_factor
from gdmd_lightning.families.sketch import sketch_pipeline
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.ranges import Range, ranged
from gdmd_lightning.schedules import few_step_sigmas

_T5 = ("text_encoder_3", "tokenizer_3")

TextLength = Annotated[int, Range(0, 512)]  # diffusers' pipeline refuses more


@ranged
class SD3Family(ModelFamily):
    """Stable Diffusion 3 or 3.5.

    Args:
        path: Directory or hub id of a ``StableDiffusion3Pipeline``.
        max_sequence_length: Number of T5 tokens, as in the pipeline's call, at most 512. Without T5 the
            pipeline passes as many zero tokens, so the length matters there too. Shapes uses 0.
        use_t5: Load the T5 encoder if the pipeline has one.
        dtype: Precision of the weights: ``float32``, ``bfloat16`` or ``float16``.

    Source: Stable Diffusion 3 (2403.03206).
    """

    pipeline_class = "StableDiffusion3Pipeline"
    repeated_blocks = ("JointTransformerBlock",)

    def __init__(
        self, path: str, max_sequence_length: TextLength = 256, use_t5: bool = True, dtype: str = "float32"
    ) -> None:
        super().__init__(path)
        self.max_sequence_length, self.use_t5, self.dtype = max_sequence_length, use_t5, dtype

    def load(self) -> nn.Module:
        """Load all weights.

        Raises:
            UserError: If the scheduler is none of diffusers' ``FlowMatch`` schedulers, or has other levels or times.
        """
        from diffusers import StableDiffusion3Pipeline

        self.pipeline = load_pipeline(
            StableDiffusion3Pipeline,
            self.path,
            self.dtype,
            may_lack=_T5,
            drop=() if self.use_t5 else _T5,
            build=self.build_network,
        )
        return self._network()

    def sketch(self) -> nn.Module:
        from diffusers import StableDiffusion3Pipeline

        self.pipeline = sketch_pipeline(
            StableDiffusion3Pipeline, self.path, self.dtype, drop=() if self.use_t5 else _T5
        )
        self._empty = self.blank_conditioning(torch.device("meta"))
        return self._network()

    def _network(self) -> nn.Module:
        # Others have a shift under another name, and may keep a FlowMatch scheduler's, which they do not use.
        scheduler = type(self.loaded.scheduler).__name__
        if not scheduler.startswith("FlowMatch"):
            raise UserError(
                f"the steps of a {scheduler} are not known",
                where="family.path",
                remedy="save the pipeline with a FlowMatchEulerDiscreteScheduler of the same shift",
            )
        check_flow_scheduler(self.loaded.scheduler)
        return self.loaded.transformer

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        # CLIP's tokens, then T5's or the zeros in their place.
        network, encoder = self.loaded.transformer.config, self.loaded.text_encoder
        length = encoder.config.max_position_embeddings + self.max_sequence_length
        like = torch.empty(0, dtype=encoder.dtype, device=device)
        return Conditioning(
            like.new_empty(1, length, network.joint_attention_dim), like.new_empty(1, network.pooled_projection_dim)
        )

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        sequence, _, pooled, _ = self.loaded.encode_prompt(
            prompt=list(texts),
            prompt_2=None,
            prompt_3=None,
            device=next(self.loaded.text_encoder.parameters()).device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        return Conditioning(sequence, pooled)

    def token_limits(self) -> dict[str, int]:
        clip = self.loaded.tokenizer_max_length
        limits = {"tokenizer": clip, "tokenizer_2": clip, "tokenizer_3": self.max_sequence_length}
        return {name: limit for name, limit in limits.items() if getattr(self.loaded, name) is not None}

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return network(
            hidden_states=x_sigma.to(conditioning.sequence.dtype),
            timestep=1000 * sigma,  # the network's time runs from 0 to 1000
            encoder_hidden_states=conditioning.sequence,
            pooled_projections=conditioning.pooled,
            return_dict=False,
        )[0]

    def feature_module(self, network: Any) -> nn.Module:
        """The middle transformer block."""
        blocks = network.transformer_blocks
        return blocks[len(blocks) // 2]

    def feature_width(self, network: Any) -> int:
        return int(network.config.num_attention_heads * network.config.attention_head_dim)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config, factor = self.loaded.transformer.config, self.loaded.vae_scale_factor
        self.grid(config, self.loaded.vae.config).check(height, width)
        return config.in_channels, height // factor, width // factor

    def grid(self, network: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> Grid:
        """Patches of latents, as many as the table of positions has on a side."""
        factor = autoencoder_factor(autoencoder["block_out_channels"])
        return Grid(factor, network["patch_size"], network["pos_embed_max_size"])

    def decode(self, latents: Tensor) -> Tensor:
        vae = self.loaded.vae
        return autoencoder.decode(vae, latents.to(vae.dtype) / vae.config.scaling_factor + vae.config.shift_factor)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        vae = self.loaded.vae
        return (autoencoder.encode(vae, images) - vae.config.shift_factor) * vae.config.scaling_factor

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention of the image and text streams, as in RTDMD (2605.26108)."""
        joint = ("to_q", "to_k", "to_v", "to_out.0")
        return (*joint, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

    def to_pipeline(
        self, network: nn.Module, steps: int, latent_shape: tuple[int, int, int], *, stochastic: bool
    ) -> Pipeline:
        """Reproduce :meth:`few_step_sigmas` with diffusers' scheduler.

        ``FlowMatchEulerDiscreteScheduler`` spaces its sigmas evenly from 1 to 0.001, shifts them, and
        stretches the result affinely to end at ``shift_terminal``. Our sigmas run evenly from 1 to
        ``1/steps`` and are then shifted by the teacher's ``s``. With ``w`` the distance from 1 on the even
        grid, both have the form ``1 - a w / (1 - b w)``. They agree if the terminal value is our last sigma
        above 0 and the shift ``m`` satisfies ``0.999 (m - 1) / m = (1 - 1/steps) (s - 1) / s``.
        """
        from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

        config = self.loaded.scheduler.config
        even = 1 - 1 / config.num_train_timesteps
        m = 1 / (1 - (1 - 1 / steps) * (config.shift - 1) / config.shift / even)
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            config,
            use_dynamic_shifting=True,  # diffusers applies a static shift twice to the last sigma
            time_shift_type="linear",
            base_shift=m,
            max_shift=m,
            shift_terminal=float(self.few_step_sigmas(steps, latent_shape)[-2]) if steps > 1 else None,
            stochastic_sampling=stochastic,
            # A teacher's own spacing is not the generator's.
            use_karras_sigmas=False,
            use_exponential_sigmas=False,
            use_beta_sigmas=False,
        )
        return StableDiffusion3Pipeline(**self.components(transformer=network, scheduler=scheduler))

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Evenly spaced sigmas (1, 3/4, 2/4, 1/4, 0 for 4 steps) with the scheduler's shift."""
        return few_step_sigmas(steps, self.loaded.scheduler.config.shift)

    def teacher_scheduler(self, steps: int, latent_shape: tuple[int, int, int]) -> Any:
        """The pipeline's own scheduler, with its shift by image size if it has one."""
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler = type(self.loaded.scheduler).from_config(self.loaded.scheduler.config)
        config, shift = scheduler.config, {}
        if config.get("use_dynamic_shifting"):
            patch = self.loaded.transformer.config.patch_size
            tokens = (latent_shape[1] // patch) * (latent_shape[2] // patch)
            lengths = config.base_image_seq_len, config.max_image_seq_len
            shift = {"mu": calculate_shift(tokens, *lengths, config.base_shift, config.max_shift)}
        scheduler.set_timesteps(steps, **shift)
        return scheduler

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length}

    def loading_arguments(self) -> dict[str, Any]:
        # from_pretrained requires every component that the class knows; None stands for an absent T5.
        return {name: None for name in _T5 if self.loaded.components[name] is None}
