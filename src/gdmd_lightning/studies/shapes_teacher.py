"""Train the embedded Shapes pipeline into one directory: autoencoder, scorer, then teacher."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, TQDMProgressBar
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from gdmd_lightning.errors import UserError
from gdmd_lightning.files import atomic_directory, filled_directory, output_directory
from gdmd_lightning.methods.checkpointing import WholeCheckpoints
from gdmd_lightning.methods.resuming import flattened
from gdmd_lightning.schedules import LogitNormal
from gdmd_lightning.shapes import pipeline as parts
from gdmd_lightning.shapes.pretraining import (
    AutoencoderTraining,
    ScorerTraining,
    TeacherTraining,
    loader,
    make_pictures,
)
from gdmd_lightning.shapes.settings import PretrainSettings, Stage
from gdmd_lightning.studies.recorded import check_recorded, record_settings


def pretrain(settings: PretrainSettings) -> Path:
    """Train the parts that are missing in ``settings.out`` and return that directory.

    Raises:
        UserError: If the directory was begun with other settings, or ``start_from`` is no such pipeline.
    """
    out = settings.out
    # A part alone may have been copied there.
    has_begun = any((out / name).is_dir() for name in ("checkpoints", "transformer"))
    made_with = _made_with(settings)
    if has_begun:
        check_recorded(out, made_with, {"": PretrainSettings}, where="pretrain", out=out)
    if settings.start_from is not None:
        _check_earlier(settings.start_from, settings)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    pl.seed_everything(settings.seed, verbose=False)
    with output_directory(out):
        if not has_begun:
            record_settings(out, made_with)
        _train_missing(settings)
    return out


def _check_earlier(earlier: Path, settings: PretrainSettings) -> None:
    """Fail before anything is written or fetched if a pipeline lacks a part, or has another size than asked for."""
    for name in ("tokenizer", "text_encoder", "text_encoder_2", "transformer"):
        if not (earlier / name).is_dir():
            raise UserError(f"there is no {earlier / name}", where="--start_from", remedy="give a pipeline's directory")
    config = SD3Transformer2DModel.load_config(earlier / "transformer")
    for option, size in (("num_layers", config["num_layers"]), ("num_heads", config["num_attention_heads"])):
        if getattr(settings, option) != size:
            raise UserError(
                f"it is {getattr(settings, option)}, and the transformer of {earlier} has {size}",
                where=f"--{option}",
                remedy=f"use --{option} {size}",
            )


def _made_with(settings: PretrainSettings) -> dict[str, Any]:
    """What decides how the pipeline becomes, as plain values by dotted key."""
    start_from = None if settings.start_from is None else str(settings.start_from)
    every = dict(flattened({**asdict(settings), "start_from": start_from}))
    return {key: value for key, value in every.items() if key not in ("out", "threads")}


def _train_missing(settings: PretrainSettings) -> None:
    earlier = settings.start_from
    # Text encoders that are trained on know the ids of their own tokenizer.
    tokenizer = parts.build_tokenizer() if earlier is None else CLIPTokenizer.from_pretrained(earlier / "tokenizer")

    if not (settings.out / "vae").is_dir():
        vae = parts.build_autoencoder()
        pictures = make_pictures(settings.pictures // 3, settings.seed)
        stage = settings.autoencoder
        module = AutoencoderTraining(vae, stage.learning_rate)
        _train(module, loader(pictures.images, batch_size=stage.batch_size), stage, settings, "vae")
        latents = _encode(vae, pictures.images)
        vae.register_to_config(scaling_factor=1 / latents.std().item(), shift_factor=latents.mean().item())
        _save(vae, settings.out / "vae")
    if not (settings.out / "scorer").is_dir():
        scorer = parts.build_scorer(tokenizer)
        pictures = make_pictures(settings.pictures, settings.seed + 1)
        stage = settings.scorer
        training = ScorerTraining(scorer, stage.learning_rate)
        batches = loader(pictures.images, _tokens(tokenizer, pictures.captions), batch_size=stage.batch_size)
        _train(training, batches, stage, settings, "scorer")
        _save(scorer, settings.out / "scorer", tokenizer)
    if not (settings.out / "transformer").is_dir():
        _train_teacher(settings, tokenizer)


def _tokens(tokenizer: CLIPTokenizer, texts: list[str]) -> Tensor:
    """Ids of texts, ``[texts, MAX_TOKENS]``."""
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def _train_teacher(settings: PretrainSettings, tokenizer: CLIPTokenizer) -> None:
    vae = AutoencoderKL.from_pretrained(settings.out / "vae")
    pictures = make_pictures(settings.pictures, settings.seed + 2)
    latents = (_encode(vae, pictures.images) - vae.config.shift_factor) * vae.config.scaling_factor
    if settings.start_from is None:
        encoders = (parts.build_text_encoder(tokenizer), parts.build_text_encoder(tokenizer))
        transformer = parts.build_transformer(settings.num_layers, settings.num_heads)
    else:
        earlier = settings.start_from
        encoders = tuple(
            CLIPTextModelWithProjection.from_pretrained(earlier / name, dtype=torch.float32)
            for name in ("text_encoder", "text_encoder_2")
        )
        transformer = SD3Transformer2DModel.from_pretrained(earlier / "transformer", dtype=torch.float32)
    empty = _tokens(tokenizer, [""])[0]
    stage = settings.teacher
    distribution = LogitNormal(shift=parts.SHIFT, low=1e-3, high=1.0)
    module = TeacherTraining(
        transformer,
        encoders,
        empty,
        distribution,
        stage.learning_rate,
        caption_noise=settings.caption_noise,
        noise_from=settings.noise_from,
        seed=settings.seed,
    )
    captions, wrong = _tokens(tokenizer, pictures.captions), _tokens(tokenizer, pictures.wrong)
    batches = loader(latents, captions, wrong, batch_size=stage.batch_size)
    _train(module, batches, stage, settings, "teacher", _AveragesAtEnd(decay=settings.ema_decay))
    _save_pipeline(settings.out, vae, tokenizer, transformer, encoders)


class _AveragesAtEnd(EMAWeightAveraging):
    """Leaves the averaged weights also after a fit that has no step left, which skips the end of training."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.on_train_end(trainer, pl_module)


def _save_pipeline(out: Path, vae: Any, tokenizer: CLIPTokenizer, transformer: Any, encoders: Any) -> None:
    """Save the whole pipeline in half precision, as diffusers expects it; its transformer says that it is complete."""
    encoders = tuple(encoder.half() for encoder in encoders)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.half(),
        scheduler=parts.build_scheduler(),
        vae=vae.half(),
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    with filled_directory(out, last="transformer") as part:
        pipeline.save_pretrained(part, safe_serialization=True)
        for name in ("vae", "transformer", "text_encoder", "text_encoder_2"):
            _tidy(part / name / "config.json")


def _tidy(config: Path) -> None:
    """Remove local paths from a part's config, and make text encoders load in float32 by default.

    diffusers loads in float32 unless asked otherwise, but transformers uses the dtype in the config.
    """
    content = json.loads(config.read_text())
    content.pop("_name_or_path", None)
    if "dtype" in content:
        content["dtype"] = "float32"
    config.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _train(
    module: pl.LightningModule,
    batches: DataLoader[Any],
    stage: Stage,
    settings: PretrainSettings,
    name: str,
    *callbacks: pl.Callback,
) -> None:
    """Run one stage; continue from its last checkpoint if an earlier run was interrupted."""
    checkpoints = settings.out / "checkpoints" / name
    keep = ModelCheckpoint(checkpoints, every_n_train_steps=1000, save_last=True, save_top_k=0)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=stage.steps,
        logger=False,
        plugins=[WholeCheckpoints()],
        callbacks=[keep, TQDMProgressBar(refresh_rate=100), *callbacks],
        enable_model_summary=False,
    )
    last = checkpoints / "last.ckpt"
    trainer.fit(module, batches, ckpt_path=last if last.exists() else None, weights_only=True)


@torch.no_grad()
def _encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(part * 2 - 1).latent_dist.mode() for part in images.split(500)])


def _save(model: Any, directory: Path, tokenizer: CLIPTokenizer | None = None) -> None:
    """Save a part, and its tokenizer if it has one, in half precision; an interrupted run leaves nothing."""
    with atomic_directory(directory) as part:
        model.half().save_pretrained(part, safe_serialization=True)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
    model.float()
