"""Tiny pipelines of the real classes with random weights, and helpers to train them in a second or two."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward


class Brightness(Reward):
    """The mean of the pixels, times 10 so that every group of images has spread."""

    name = "brightness"
    differentiable = True

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return 10 * images.mean((1, 2, 3))


def save_pipeline(path: Path, *, layers: int = 1, heads: int = 1, shift: float | None = None, seed: int = 0) -> Path:
    """Write a ``StableDiffusion3Pipeline`` with random weights; heads are 32 wide."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    from gdmd_lightning.shapes import pipeline as parts

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = parts.build_tokenizer()
        pipeline = StableDiffusion3Pipeline(
            transformer=parts.build_transformer(layers, heads),
            scheduler=parts.build_scheduler() if shift is None else FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=parts.build_autoencoder(),
            text_encoder=parts.build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=parts.build_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def save_sdxl(path: Path, *, prediction: str = "epsilon", spacing: str = "leading") -> Path:
    """Write a ``StableDiffusionXLPipeline`` with random weights, for 32x32 pictures in 8x8 latents."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    from gdmd_lightning.shapes import pipeline as parts

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = parts.build_tokenizer()
        second = parts.build_text_encoder(tokenizer)
        width, pooled = second.config.hidden_size, second.config.projection_dim
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 1),
            cross_attention_dim=2 * width, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + pooled, norm_num_groups=8,
        )  # fmt: skip
        pipeline = StableDiffusionXLPipeline(
            unet=unet,
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                prediction_type=prediction, timestep_spacing=spacing, steps_offset=1,
            ),
            vae=parts.build_autoencoder(),
            text_encoder=CLIPTextModel(second.config),
            tokenizer=tokenizer,
            text_encoder_2=second,
            tokenizer_2=tokenizer,
            add_watermarker=False,
        )  # fmt: skip
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


CHAT = (
    "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% endif %}"
)


def save_flux2(path: Path, *, klein: bool = True) -> Path:
    """Write a ``Flux2KleinPipeline``, or a ``Flux2Pipeline``, with random weights, for 32x32 pictures in 8x8 patches
    of 4x4 pixels.
    """
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Pipeline,
        Flux2Transformer2DModel,
    )

    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, text_encoder = _qwen(path.parent) if klein else _mistral(path.parent)
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8), layers_per_block=1, latent_channels=2, norm_num_groups=4, sample_size=32,
        )  # fmt: skip
        vae.bn.running_mean.normal_()
        vae.bn.running_var.uniform_(0.5, 2.0)
        pipeline = (Flux2KleinPipeline if klein else Flux2Pipeline)(
            transformer=Flux2Transformer2DModel(
                patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
                axes_dims_rope=(4, 4, 4, 4), guidance_embeds=not klein,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )  # fmt: skip
    pipeline.save_pretrained(path, safe_serialization=True)
    return path


def _bytes(place: Path, *special: str) -> None:
    """Train a tokenizer on the words of Shapes and save it to a directory."""
    from tokenizers import ByteLevelBPETokenizer

    from gdmd_lightning.shapes.captions import WORDS

    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator([" ".join(WORDS)], vocab_size=300, special_tokens=["<|endoftext|>", *special])
    trained.save_model(str(place))


def _qwen(place: Path) -> tuple[Any, Any]:
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    _bytes(place)
    tokenizer = Qwen2TokenizerFast.from_pretrained(place, pad_token="<|endoftext|>", chat_template=CHAT)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    return tokenizer, Qwen3ForCausalLM(config)


PIECES = (
    "{% for message in messages %}{% for piece in message['content'] %}{{ piece['text'] }}{% endfor %}"
    "<|endoftext|>{% endfor %}"
)


def _mistral(place: Path) -> tuple[Any, Any]:
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralImageProcessor,
        PixtralProcessor,
        PixtralVisionConfig,
        Qwen2TokenizerFast,
    )

    images = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    _bytes(place, *images)
    tokenizer = Qwen2TokenizerFast.from_pretrained(
        place, pad_token="<|endoftext|>", padding_side="left", additional_special_tokens=list(images)
    )
    processor = PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=PIECES)
    text = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=tokenizer.vocab["[IMG]"])
    return processor, Mistral3ForConditionalGeneration(config)


def family(path: Path) -> SD3Family:
    return SD3Family(str(path), max_sequence_length=0)


def module(path: Path, method: type[DistillationModule] = GDMD, **options: Any) -> DistillationModule:
    """A method on a tiny pipeline; GDMD with :class:`Brightness` by default.

    The fake score of DMD and GDMD learns twice in an update, not five times: half of the seconds.
    """
    if issubclass(method, GDMD):
        options = {"reward": Brightness(), **options}
    if method in (DMD, GDMD):
        options = {"matching": Matching(fake_score_updates=2), **options}
    return method(family(path), height=32, width=32, **options)


def trainer(updates: int, **options: Any) -> pl.Trainer:
    """A trainer of ``updates`` updates; by default it writes nothing."""
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    where = {"accelerator": "cpu", "devices": 1}
    return pl.Trainer(max_steps=updates, **{"max_epochs": -1, **where, **quiet, **options})


def train(
    module: DistillationModule, updates: int, *, data: dict[str, Any] | None = None, **options: Any
) -> pl.Trainer:
    """Train on Shapes' prompts and return the trainer."""
    fitting = trainer(updates, **options)
    fitting.fit(module, datamodule=PromptDataModule("shapes", **{"batch_size": 8, "group_size": 4, **(data or {})}))
    return fitting


class SaveAfter(pl.Callback):
    """Saves a checkpoint after a number of updates, from which another run can go on like this one."""

    def __init__(self, updates: int, path: Path) -> None:
        self.updates, self.path = updates, path

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.updates == self.updates:
            trainer.save_checkpoint(self.path)


def differing(one: Any, other: Any, at: str = "") -> list[str]:
    """Paths at which two nested structures of tensors and plain values differ; tensors are compared to the bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [] if one.keys() == other.keys() else [f"{at}: keys {one.keys() ^ other.keys()}"]
        return found + [d for key in one.keys() & other.keys() for d in differing(one[key], other[key], f"{at}/{key}")]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        found = [] if len(one) == len(other) else [f"{at}: lengths {len(one)}, {len(other)}"]
        return found + [d for i, (a, b) in enumerate(zip(one, other)) for d in differing(a, b, f"{at}/{i}")]
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return [] if torch.equal(one, other) else [at]
    return [] if type(one) is type(other) and one == other else [at]
