"""Pipelines of the real SD3 classes with random weights, and trainers that write nothing: what the benchmarks share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from gdmd_lightning.configuration.noise import quiet
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.shapes import pipeline as parts


class Brightness(Reward):
    """Ten times the mean of the pixels, so that every group of pictures has spread."""

    name, differentiable = "brightness", True

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return 10 * images.mean((1, 2, 3))


def write_pipeline(
    directory: Path, layers: int, heads: int, build: Callable[[int, int], nn.Module] = parts.build_transformer
) -> Path:
    """A ``StableDiffusion3Pipeline`` with random weights; its transformer is ``32 * heads`` wide, for 32x32 pixels."""
    from diffusers import StableDiffusion3Pipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokenizer = parts.build_tokenizer()
    StableDiffusion3Pipeline(
        transformer=build(layers, heads),
        scheduler=parts.build_scheduler(),
        vae=parts.build_autoencoder(),
        text_encoder=parts.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=parts.build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(directory)
    return directory


def method(
    name: str, pipeline: Path | str, targets: int = 2, fake_score_updates: int = 3, steps: int = 4, **more: Any
) -> DistillationModule:
    """DMD or GDMD (with its policy term at the target) on a pipeline, with a guided teacher."""
    family = SD3Family(str(pipeline), max_sequence_length=0)
    options: dict[str, Any] = {"height": 32, "width": 32, "steps": steps, **more}
    options["matching"] = Matching(guidance_scale=3.0, fake_score_updates=fake_score_updates)
    if name == "DMD":
        return DMD(family, **options)
    return GDMD(family, reward=Brightness(), targets=TargetGroup(targets), **options)


def train(
    module: DistillationModule,
    updates: int,
    batch_size: int,
    group_size: int,
    *watching: pl.Callback,
    source: str = "shapes",
) -> None:
    """Train on the CPU with one thread and callbacks that watch; nothing is written."""
    torch.set_num_threads(1)
    quiet()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=updates, max_epochs=-1, logger=False, callbacks=list(watching),
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=PromptDataModule(source, batch_size=batch_size, group_size=group_size))
