"""FLUX.2 and FLUX.2 klein: rectified flow on normalized latent patches, with an LLM as text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families import autoencoder
from gdmd_lightning.families.base import ModelFamily, Pipeline
from gdmd_lightning.families.loading import check_flow_scheduler, load_pipeline
from gdmd_lightning.families.resolution import Grid, autoencoder_factor
from gdmd_lightning.families.sketch import sketch_pipeline
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.ranges import Count, Whole, ranged


@ranged
class Flux2KleinFamily(ModelFamily):
    """FLUX.2 klein, base or distilled.

    Latents, here and in the pipeline's ``latents`` argument, are 2x2 patches of the autoencoder's ``c``
    channels, ``[B, 4 c, height / 16, width / 16]``, normalized with the autoencoder's statistics.

    Args:
        path: Directory or hub id of a ``Flux2KleinPipeline``.
        max_sequence_length: Number of tokens that prompts are padded or cut to, as in the pipeline's call.
        text_layers: Layers of the text encoder whose hidden states condition the network, as in the
            pipeline's call.
        dtype: Precision of the weights: ``float32``, ``bfloat16`` or ``float16``.

    Source: diffusers' ``Flux2KleinPipeline``; distilled in RTDMD (2605.26108).
    """

    pipeline_class = "Flux2KleinPipeline"
    repeated_blocks = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    embeds_guidance = False
    _pipeline_arguments: ClassVar[dict[str, Any]] = {"is_distilled": True}

    def __init__(
        self,
        path: str,
        max_sequence_length: Count = 512,
        text_layers: tuple[Whole, ...] = (9, 18, 27),
        dtype: str = "float32",
    ) -> None:
        super().__init__(path)
        self.max_sequence_length, self.text_layers, self.dtype = max_sequence_length, text_layers, dtype

    def load(self) -> nn.Module:
        """Load all weights.

        Raises:
            UserError: If the text encoder has fewer layers than requested, the network takes another number of
                them, or it takes the guidance scale as an input and should not, or the other way round; or if the
                scheduler is no ``FlowMatchEulerDiscreteScheduler``, or has other levels or times.
        """
        import diffusers

        self.pipeline = load_pipeline(
            getattr(diffusers, self.pipeline_class), self.path, self.dtype, build=self.build_network
        )
        return self._network()

    def sketch(self) -> nn.Module:
        import diffusers

        self.pipeline = sketch_pipeline(getattr(diffusers, self.pipeline_class), self.path, self.dtype)
        self._empty = self.blank_conditioning(torch.device("meta"))
        return self._network()

    def _network(self) -> nn.Module:
        encoder = self.loaded.text_encoder.config.get_text_config()
        layers, width = encoder.num_hidden_layers, self.loaded.transformer.config.joint_attention_dim
        if max(self.text_layers, default=0) > layers:
            raise UserError(
                f"the text encoder has {layers} layers, not {max(self.text_layers)}", where="family.text_layers"
            )
        if len(self.text_layers) * encoder.hidden_size != width:
            raise UserError(
                f"{len(self.text_layers)} layers of width {encoder.hidden_size} are not the network's {width}",
                where="family.text_layers",
                remedy=f"give {width // encoder.hidden_size} layers",
            )
        if self.loaded.transformer.config.guidance_embeds != self.embeds_guidance:
            takes = "takes no guidance scale" if self.embeds_guidance else "takes the guidance scale as an input"
            raise UserError(
                f"the network {takes}",
                where="family.path",
                remedy="use Flux2KleinFamily for klein models and Flux2Family for FLUX.2",
            )
        scheduler = type(self.loaded.scheduler).__name__
        if scheduler != "FlowMatchEulerDiscreteScheduler":
            raise UserError(
                f"the steps of a {scheduler} are not known",
                where="family.path",
                remedy="save the pipeline with a FlowMatchEulerDiscreteScheduler",
            )
        check_flow_scheduler(self.loaded.scheduler)
        return self.loaded.transformer

    def blank_conditioning(self, device: torch.device) -> Conditioning:
        length, width = self.max_sequence_length, self.loaded.transformer.config.joint_attention_dim
        sequence = torch.empty(1, length, width, dtype=self.loaded.text_encoder.dtype, device=device)
        return Conditioning(sequence, ids=torch.zeros(1, length, 4, dtype=torch.long, device=device))

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        """Embed prompts; ``ids`` are the positions of the tokens."""
        sequence, ids = self.loaded.encode_prompt(
            list(texts),
            device=next(self.loaded.text_encoder.parameters()).device,
            max_sequence_length=self.max_sequence_length,
            text_encoder_out_layers=self.text_layers,
        )
        return Conditioning(sequence, ids=ids)

    def token_limits(self) -> dict[str, int]:
        return {"tokenizer": self.max_sequence_length}

    def token_count(self, tokenizer: str, text: str) -> int:
        # As the pipeline does; it has no method for this step alone.
        messages = [{"role": "user", "content": text}]
        chat = self.loaded.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(self.loaded.tokenizer(chat).input_ids)

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self._call_transformer(network, x_sigma, sigma, conditioning, None)

    def _call_transformer(
        self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: Tensor | None
    ) -> Tensor:
        """Velocity ``[B, C, H, W]``; each of the ``H W`` positions is one token.

        Args:
            network: The transformer.
            x_sigma: Noisy latents, ``[B, C, H, W]``.
            sigma: Noise levels, which are also the transformer's time, ``[B]``.
            conditioning: ``B`` rows in the transformer's dtype.
            guidance: Guidance scales, ``[B]``, if the transformer takes them as an input.
        """
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

    def feature_module(self, network: Any) -> nn.Module:
        """The middle block of all transformer blocks, double-stream blocks first."""
        blocks = [*network.transformer_blocks, *network.single_transformer_blocks]
        return blocks[len(blocks) // 2]

    def feature_width(self, network: Any) -> int:
        return int(network.config.num_attention_heads * network.config.attention_head_dim)

    def _image_tokens(self, output: Any, x_sigma: Tensor) -> Tensor:
        # A single-stream block returns text and image tokens in one sequence, text first.
        return super()._image_tokens(output, x_sigma)[:, -x_sigma[0, 0].numel() :]

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        config, unit = self.loaded.transformer.config, 2 * self.loaded.vae_scale_factor
        self.grid(config, self.loaded.vae.config).check(height, width)
        return config.in_channels, height // unit, width // unit

    def grid(self, network: Mapping[str, Any], autoencoder: Mapping[str, Any]) -> Grid:
        """2x2 patches of latents; positions are rotary, without a limit."""
        return Grid(autoencoder_factor(autoencoder["block_out_channels"]), patch=2)

    def decode(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        patches = self.loaded._unpatchify_latents(latents * std + mean)
        return autoencoder.decode(self.loaded.vae, patches)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        patches = self.loaded._patchify_latents(autoencoder.encode(self.loaded.vae, images))
        mean, std = self._statistics(patches)
        return (patches - mean) / std

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each patch channel, ``[1, 4 c, 1, 1]``."""
        norm, eps = self.loaded.vae.bn, self.loaded.vae.config.batch_norm_eps
        mean, std = norm.running_mean, torch.sqrt(norm.running_var + eps)
        return mean.view(1, -1, 1, 1).to(like), std.view(1, -1, 1, 1).to(like)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Attention of double-stream blocks, fused projections of the others, as in RTDMD (2605.26108)."""
        joint = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        return (*joint, "to_qkv_mlp_proj", "to_out")

    def to_pipeline(
        self, network: nn.Module, steps: int, latent_shape: tuple[int, int, int], *, stochastic: bool
    ) -> Pipeline:
        """Keep the pipeline's own scheduler: its sigmas are :meth:`few_step_sigmas`."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            self.loaded.scheduler.config, stochastic_sampling=stochastic
        )
        components = self.components(transformer=network, scheduler=scheduler)
        return type(self.loaded)(**components, **self._pipeline_arguments)

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Evenly spaced sigmas (1, 3/4, 2/4, 1/4, 0 for 4 steps) with the pipeline's shift.

        The pipeline's shift depends on the number of steps and the number of image tokens.
        """
        return self.teacher_scheduler(steps, latent_shape).sigmas.clone()

    def teacher_scheduler(self, steps: int, latent_shape: tuple[int, int, int]) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.loaded.scheduler.config)
        even = np.linspace(1.0, 1 / steps, steps)
        _, height, width = latent_shape
        scheduler.set_timesteps(sigmas=even, mu=compute_empirical_mu(height * width, steps))
        return scheduler

    def sampling_arguments(self) -> dict[str, Any]:
        return {"max_sequence_length": self.max_sequence_length, "text_encoder_out_layers": self.text_layers}


@ranged
class Flux2Family(Flux2KleinFamily):
    """FLUX.2, whose network takes the guidance scale as an input and needs no second, unconditional pass.

    Generator and fake score get a scale of 1, as in a call of the exported pipeline with
    ``guidance_scale=1.0``.

    The processor of the text encoder requires torchvision (``pip install gdmd_lightning[flux2]``).

    Args:
        path: Directory or hub id of a ``Flux2Pipeline``.
        max_sequence_length: Number of tokens that prompts are padded or cut to, as in the pipeline's call.
        text_layers: Layers of the text encoder whose hidden states condition the network, as in the
            pipeline's call.
        dtype: Precision of the weights: ``float32``, ``bfloat16`` or ``float16``.

    Source: diffusers' ``Flux2Pipeline``.
    """

    pipeline_class = "Flux2Pipeline"
    embeds_guidance = True
    guided_passes = 1
    _pipeline_arguments: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        path: str,
        max_sequence_length: Count = 512,
        text_layers: tuple[Whole, ...] = (10, 20, 30),
        dtype: str = "float32",
    ) -> None:
        super().__init__(path, max_sequence_length, text_layers, dtype)

    def token_limits(self) -> dict[str, int]:
        # The processor's chat has images and a system message of the pipeline; not counted here.
        return {}

    def predict_velocity(
        self,
        network: nn.Module,
        x_sigma: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
    ) -> Tensor:
        """The velocity, with ``guidance_scale`` as an input of the network."""
        cast = conditioning.cast(next(network.parameters()).dtype)
        guidance = torch.full_like(sigma, guidance_scale)
        return self._call_transformer(network, x_sigma, sigma, cast, guidance).to(x_sigma.dtype)

    def guidance(
        self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """The velocity at ``guidance_scale`` minus that at 1."""
        guided, plain = (
            self.predict_velocity(network, x_sigma, sigma, conditioning, scale) for scale in (guidance_scale, 1.0)
        )
        return guided - plain

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self._call_transformer(network, x_sigma, sigma, conditioning, torch.ones_like(sigma))
