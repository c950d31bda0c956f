"""Scores of the few-step generator's averaged weights on fixed test prompts, while it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from gdmd_lightning.callbacks.pictures import picture_grid
from gdmd_lightning.callbacks.run_directory import run_directory
from gdmd_lightning.callbacks.write_warnings import warn_if_not_written
from gdmd_lightning.data.evaluation_prompts import read_evaluation_prompts
from gdmd_lightning.files import atomic_file
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.metrics.evaluation import evaluate, shown
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.ranges import Count, NonNegative, Seed, Steps, Whole, ranged


@ranged
class GenerationEvaluation(pl.Callback):
    """Scores the generator at regular intervals and at the end, and draws it next to its teacher.

    Scores are logged as ``eval/<score>/<task>``, so that ``ModelCheckpoint`` can monitor them; the image grid goes to
    TensorBoard and to ``pictures/`` in the run's directory.

    Args:
        scores: What to compute.
        prompts: ``shapes``, or a prompt file as the data module reads it.
        count: Number of prompts; for Shapes the same number of each task.
        every_n_updates: Updates between two evaluations.
        batch_size: Images generated at once.
        columns: Images in the grid; 0 for no grid.
        teacher_steps, teacher_guidance: Steps and guidance scale of the teacher in the grid.
        seed: Seed of the noise.
    """

    def __init__(
        self,
        scores: list[TaskScore],
        prompts: str = "shapes",
        count: Count = 600,
        every_n_updates: Count = 100,
        batch_size: Count = 100,
        columns: Whole = 8,
        teacher_steps: Steps = 30,
        teacher_guidance: NonNegative = 3.0,
        seed: Seed = 0,
    ) -> None:
        self.scores, self.every_n_updates, self.batch_size = scores, every_n_updates, batch_size
        self.prompts = read_evaluation_prompts(prompts, count)
        for score in scores:
            score.check(self.prompts)
        self.columns, self.seed = columns, seed
        self.teacher_steps, self.teacher_guidance = teacher_steps, teacher_guidance
        self._teacher_pictures: Tensor | None = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Evaluate when due."""
        assert isinstance(pl_module, DistillationModule)
        last = trainer.global_step >= trainer.max_steps > 0
        if pl_module.updates % self.every_n_updates == 0 or last:
            self.run(trainer, pl_module)

    def run(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        """Evaluate now."""
        seconds = evaluate(
            module.generate,
            self.prompts,
            self.scores,
            module.latent_shape,
            seed=self.seed,
            batch_size=self.batch_size,
            device=module.device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )
        values = {f"eval/{s.name}/{task}": value for s in self.scores for task, value in s.compute().items()}
        found = {name.removeprefix("eval/"): float(value) for name, value in values.items()}
        module.provenance = replace(module.provenance, scores=found)
        measured: dict[str, Any] = {**values, "eval/seconds_per_picture": seconds}
        log_figures(trainer, module, measured)
        directory = run_directory(trainer)
        if self.columns and trainer.is_global_zero:
            self._draw(trainer, module, directory / "pictures")

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, module: DistillationModule, directory: Path) -> None:
        texts, noise = shown(self.prompts, self.columns, module.latent_shape, self.seed)
        noise = noise.to(module.device)
        if self._teacher_pictures is None:
            pictures = module.generate_teacher(noise, texts, self.teacher_steps, self.teacher_guidance)
            self._teacher_pictures = pictures.cpu()
        figure = picture_grid(
            {
                f"teacher, {self.teacher_steps}": self._teacher_pictures,
                f"ours, {module.steps}": module.generate(noise, texts).cpu(),
            },
            texts,
        )
        with warn_if_not_written(), atomic_file(directory / f"{module.updates:06d}.png") as part:
            figure.savefig(part, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with warn_if_not_written():
                    logger.experiment.add_figure("teacher and generator", figure, module.updates)


def log_figures(trainer: pl.Trainer, module: DistillationModule, measured: dict[str, Any]) -> None:
    """Log figures at this update, once in every logger; callbacks such as ``ModelCheckpoint`` see them too."""
    # Loggers are called here: Lightning would log them at its own interval, not at all or again and again.
    module.log_dict(measured, logger=False, batch_size=1)
    trainer.logged_metrics.update(measured)
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in measured.items()}, step=module.updates)
        logger.save()
