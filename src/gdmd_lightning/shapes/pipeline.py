"""Parts of the embedded pipeline: the real classes of Stable Diffusion 3, small enough to train on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from gdmd_lightning.locations import resolve
from gdmd_lightning.shapes.scenes import SIZE

MAX_TOKENS = 12  # the longest caption has 9 words, plus the start and end tokens
LATENT_CHANNELS = 4
TEXT_WIDTH = 64
SHIFT = 1.0  # less than SD3's 3, because small pictures lose their layout at lower noise than large ones


def build_tokenizer() -> CLIPTokenizer:
    """The shipped CLIP tokenizer: every word of the world is one token; other words are split into letters."""
    # Not trained here: training numbers tokens of equal counts in another order each time.
    file = resolve("package:assets/shapes/tokenizer/tokenizer.json")
    model = json.loads(Path(file).read_text(encoding="utf-8"))["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=MAX_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A three-layer CLIP text encoder of width 64."""
    return CLIPTextModelWithProjection(_text_config(tokenizer))


def build_scorer(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A small CLIP on whole pictures, for the contrastive score."""
    vision = {
        "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3,
        "image_size": SIZE, "patch_size": 4, "projection_dim": TEXT_WIDTH,
    }  # fmt: skip
    text = _text_config(tokenizer).to_dict()
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=TEXT_WIDTH))


def _text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=TEXT_WIDTH, intermediate_size=2 * TEXT_WIDTH, num_hidden_layers=3,
        num_attention_heads=2, max_position_embeddings=MAX_TOKENS, projection_dim=TEXT_WIDTH,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip


def build_autoencoder() -> AutoencoderKL:
    """An autoencoder between 32x32x3 pictures and 8x8x4 latents."""
    return AutoencoderKL(
        block_out_channels=(16, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=LATENT_CHANNELS,
        norm_num_groups=8, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
        sample_size=SIZE, scaling_factor=1.0, shift_factor=0.0, force_upcast=False,
    )  # fmt: skip


def build_transformer(num_layers: int, num_heads: int) -> SD3Transformer2DModel:
    """An SD3 transformer with 32-wide heads on 16 image tokens (2x2 patches of 8x8 latents)."""
    return SD3Transformer2DModel(
        sample_size=SIZE // 4, patch_size=2, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
        num_layers=num_layers, attention_head_dim=32, num_attention_heads=num_heads,
        caption_projection_dim=32 * num_heads, joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH, pos_embed_max_size=SIZE // 8, qk_norm="rms_norm",
    )  # fmt: skip


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The scheduler of SD3: Euler steps on rectified flow."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)
