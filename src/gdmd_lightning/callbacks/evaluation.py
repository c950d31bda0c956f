"""Scores of the few-step generator's averaged weights on fixed test prompts, while it trains, and its teacher's."""

from __future__ import annotations

import hashlib
import json
import math
import re
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from gdmd_lightning.callbacks.interruption import StopOnSignal
from gdmd_lightning.callbacks.kept_pictures import KeptPictures
from gdmd_lightning.callbacks.monitored_scores import check_monitors
from gdmd_lightning.callbacks.pictures import picture_grid
from gdmd_lightning.callbacks.run_directory import run_directory
from gdmd_lightning.callbacks.write_warnings import warn_if_not_written
from gdmd_lightning.data.evaluation_prompts import COLUMN, SPLIT, read_evaluation_prompts
from gdmd_lightning.files import atomic_file
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.metrics.evaluation import Generate, Pace, check_names, evaluate, shown
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.ranges import Count, NonNegative, Seed, Steps, Whole, ranged

SCORES = "GenerationEvaluation.scores"


@ranged
class GenerationEvaluation(pl.Callback):
    """Scores the generator at regular intervals, at ``max_steps`` and in ``trainer.validate``, next to its teacher.

    Scores are logged as ``eval/<score>/<task>``. A ``ModelCheckpoint`` can monitor them; its ``every_n_train_steps``
    must be ``every_n_updates`` or a multiple of it. The image grid goes to TensorBoard and to ``pictures/`` in the
    run's directory. Every picture is kept as PNG in ``evaluations/``, in a directory for the teacher and one for each
    evaluation, with a list of prompts, seeds and all scores; an evaluation that was interrupted continues from there
    when the run is resumed, at its start if its update is in the checkpoint. The teacher's scores are computed once, at
    the first evaluation, kept in checkpoints, and logged with each evaluation as ``teacher/<score>/<task>``, a level
    line. A ``fast_dev_run`` evaluates, but writes nothing.

    Args:
        scores: What to compute.
        prompts: ``shapes``, ``geneval`` for its official prompts, or a prompt file as the data module reads it.
        column, split: As of the data module.
        tag: Key or column of the file by which scores are reported, or ``file`` for the name of each file of a folder;
            null for the key ``tag`` of ``.jsonl`` and ``.json`` files, where they have it.
        count: Number of prompts; for Shapes the same number of each task. Of a file the first ones, or with ``tag``
            prompts spread over all.
        per_prompt: Pictures of each prompt; GenEval's published scores are of four.
        every_n_updates: Updates between two evaluations.
        batch_size: Images generated at once.
        columns: Images in the grid; 0 for no grid.
        teacher_steps, teacher_guidance: Steps and guidance scale of the teacher in the grid and the scores.
        score_teacher: Whether the teacher is scored; a picture costs ``teacher_steps`` evaluations of its network, or
            twice as many with guidance, and about twice as many again with a scheduler of second order.
        keep_pictures: ``all``, ``latest`` for those of the teacher and the latest evaluation (lists of all are kept),
            or ``none``, with which an interrupted evaluation starts over.
        seed: Seed of the noise.

    Attributes:
        teacher: The teacher's scores by name, ``<score>/<task>``; empty before the first evaluation.
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
        score_teacher: bool = True,
        per_prompt: Count = 1,
        keep_pictures: Literal["all", "latest", "none"] = "all",
        seed: Seed = 0,
        column: str = COLUMN,
        split: str = SPLIT,
        tag: str | None = None,
    ) -> None:
        check_names(scores, SCORES)
        self.source, self.count, self.per_prompt, self.score_teacher = prompts, count, per_prompt, score_teacher
        self.teacher: dict[str, float] = {}
        self._latent_shape: tuple[int, ...] | None = None
        self._evaluated: int | None = None
        self.keep_pictures = keep_pictures
        self.scores, self.every_n_updates, self.batch_size = scores, every_n_updates, batch_size
        self.columns_of_prompts = {"column": column, "split": split, "tag": tag}
        found = read_evaluation_prompts(prompts, count, column=column, split=split, tag=tag)
        self.prompts = [each for each in found for _ in range(per_prompt)]
        for score in scores:
            score.check(self.prompts)
        self.columns, self.seed = columns, seed
        self.teacher_steps, self.teacher_guidance = teacher_steps, teacher_guidance
        self._teacher_pictures: Tensor | None = None
        # Now: a reward's attributes may change while it scores.
        settings = json.dumps([score.settings() for score in scores], sort_keys=True)
        self._scores_digest = hashlib.sha256(settings.encode()).hexdigest()

    @property
    def state_key(self) -> str:
        """Names the settings of the teacher's scores: a run resumed with others computes them again.

        Weights count by their path.
        """
        prompts = {"prompts": self.source, "count": self.count, "per_prompt": self.per_prompt, "seed": self.seed}
        prompts |= self.columns_of_prompts
        teacher = {"teacher_steps": self.teacher_steps, "teacher_guidance": self.teacher_guidance}
        scores = {"scores": self._scores_digest, "every_n_updates": self.every_n_updates}
        return self._generate_state_key(**scores, **prompts, **teacher)

    def state_dict(self) -> dict[str, Any]:
        """The teacher's scores, the shape of the latents of which they are, and the update of the last evaluation."""
        return {"teacher": self.teacher, "latent_shape": self._latent_shape, "evaluated": self._evaluated or 0}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do not compute the teacher's scores again."""
        self.teacher, shape = dict(state_dict["teacher"]), state_dict.get("latent_shape")
        self._evaluated = state_dict.get("evaluated")  # earlier versions saved after the evaluation only
        self._latent_shape = None if shape is None else tuple(shape)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Load what the scores need, so that nothing is missing at the first evaluation, hours later.

        Raises:
            UserError: If another evaluation of the run has a score of the same name, a ``ModelCheckpoint`` would not
                save the best checkpoint by a score that it monitors, or something is missing.
        """
        evaluations = self._evaluations(trainer)
        check_names([score for each in evaluations for score in each.scores], SCORES)
        for each in evaluations:
            figures = {score.name: score.figures(each.prompts) for score in each.scores}
            check_monitors(trainer, figures, each.every_n_updates)
        for score in self.scores:
            score.prepare()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Finish an update whose checkpoint is of a stop during its evaluation: evaluate, and save what is due then."""
        assert isinstance(pl_module, DistillationModule)
        if self._is_left(trainer, pl_module):
            self.run(trainer, pl_module)
            if not any(each._is_left(trainer, pl_module) for each in self._evaluations(trainer)):
                for keeper in trainer.checkpoint_callbacks:
                    keeper.on_train_batch_end(trainer, pl_module, {}, None, 0)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: object, batch: PromptBatch, batch_idx: int
    ) -> None:
        """Evaluate when due."""
        assert isinstance(pl_module, DistillationModule)
        if self._is_due(trainer, pl_module):
            self.run(trainer, pl_module)

    def _is_left(self, trainer: pl.Trainer, module: DistillationModule) -> bool:
        """Whether the update from which a run is resumed was saved before this evaluation."""
        return self._evaluated not in (None, module.updates) and self._is_due(trainer, module)

    def _is_due(self, trainer: pl.Trainer, module: DistillationModule) -> bool:
        last = trainer.global_step >= trainer.max_steps > 0
        return module.updates > 0 and (module.updates % self.every_n_updates == 0 or last)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluate once in ``trainer.validate``."""
        assert isinstance(pl_module, DistillationModule)
        if trainer.state.fn == TrainerFn.VALIDATING:
            self.run(trainer, pl_module)

    def run(self, trainer: pl.Trainer, module: DistillationModule) -> None:
        """Evaluate now."""
        # A run may go on with pictures of another size; checkpoints of earlier versions do not have it.
        if self.score_teacher and (not self.teacher or self._latent_shape not in (None, module.latent_shape)):
            teacher = partial(_of_teacher, module, self.teacher_steps, self.teacher_guidance)
            self._score(trainer, module, "teacher", teacher)
            self.teacher = {name: float(value) for name, value in self._values().items()}
        self._latent_shape = module.latent_shape
        seconds = self._score(trainer, module, "ema", module.generate)
        values = self._values()
        others = tuple(f"{name}/" for name in self._names_of_others(trainer))
        kept = {name: value for name, value in module.provenance.scores.items() if name.startswith(others)}
        scores = {**kept, **{name: float(value) for name, value in values.items()}}
        module.provenance = replace(module.provenance, scores=scores)
        measured: dict[str, Any] = {f"eval/{name}": value for name, value in values.items()}
        measured |= {f"teacher/{name}": value for name, value in self.teacher.items()}
        measured |= {} if math.isnan(seconds) else {"eval/seconds_per_picture": seconds}
        if trainer.state.fn == TrainerFn.VALIDATING:
            module.log_dict(measured, batch_size=1)  # Lightning logs them once, and returns them
        else:
            log_figures(trainer, module, measured)
        self._evaluated = module.updates
        directory = run_directory(trainer)
        if self.columns:
            self._draw(trainer, module, directory / "pictures")

    def _score(self, trainer: pl.Trainer, module: DistillationModule, role: str, generate: Generate) -> float:
        """Fill the scores with a generator's pictures on all ranks; the seconds that one picture took."""
        keeps = self.keep_pictures != "none" and not trainer.fast_dev_run  # type: ignore[attr-defined]
        kept = self._kept(trainer, module, role) if keeps else None
        seconds = evaluate(
            generate,
            self.prompts,
            self.scores,
            module.latent_shape,
            seed=self.seed,
            batch_size=self.batch_size,
            device=module.device,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            known={} if kept is None else kept.known(self.prompts),
            keep=None if kept is None else partial(_keep, kept),
            pace=_Together(trainer, module, role),
        )
        trainer.strategy.barrier()  # the lists of all ranks are complete
        if kept is not None and trainer.is_global_zero:
            with warn_if_not_written():
                kept.finish()
                if self.keep_pictures == "latest" and role != "teacher":
                    kept.remove_earlier()
        return seconds

    def _kept(self, trainer: pl.Trainer, module: DistillationModule, role: str) -> KeptPictures:
        """Where the pictures of the teacher, or of the averaged generator at this update, are kept."""
        of_teacher, levels = role == "teacher", module.sigmas.tolist()
        drawn_by = module.teacher_digest if of_teacher else f"{module.weights_digest(role)} {levels} {module.sampler}"
        settings = f"{self.state_key} {role} {drawn_by} {module.latent_shape}"
        key = hashlib.sha256(settings.encode()).hexdigest()[:32]
        name = role if of_teacher else f"{module.updates:06d}"
        directory = run_directory(trainer) / "evaluations" / self._name(trainer) / name
        return KeptPictures(directory, key, self.per_prompt, self.seed, trainer.global_rank)

    def _name(self, trainer: pl.Trainer) -> str:
        """That of the prompts, with a number if an evaluation before this one has the same."""
        evaluations = self._evaluations(trainer)
        names = [re.sub(r"[^\w.-]+", "-", Path(each.source).stem) or "prompts" for each in evaluations]
        place = evaluations.index(self)
        number = names[: place + 1].count(names[place])
        return names[place] if number == 1 else f"{names[place]}-{number}"

    def _names_of_others(self, trainer: pl.Trainer) -> set[str]:
        """Names of the scores of the run's other evaluations."""
        return {score.name for each in self._evaluations(trainer) if each is not self for score in each.scores}

    def _evaluations(self, trainer: pl.Trainer) -> list[GenerationEvaluation]:
        """All evaluations of the run."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        return [each for each in callbacks if isinstance(each, GenerationEvaluation)]

    def _values(self) -> dict[str, Tensor]:
        return {f"{s.name}/{task}": value for s in self.scores for task, value in s.compute().items()}

    @torch.no_grad()
    def _draw(self, trainer: pl.Trainer, module: DistillationModule, directory: Path) -> None:
        """Draw on rank 0; the others only keep it company where weights are in shards."""
        texts, noise = shown(self.prompts, self.columns, module.latent_shape, self.seed)
        noise = noise.to(module.device)
        with module.roles.lockstep("teacher"):
            if trainer.is_global_zero and self._teacher_pictures is None:
                pictures = module.generate_teacher(noise, texts, self.teacher_steps, self.teacher_guidance)
                self._teacher_pictures = pictures.cpu()
        with module.roles.lockstep("ema"):
            ours = module.generate(noise, texts).cpu() if trainer.is_global_zero else None
        if ours is None or self._teacher_pictures is None:
            return
        figure = picture_grid(
            {
                f"teacher, {self.teacher_steps}": self._teacher_pictures,
                f"ours, {module.steps}": ours,
            },
            texts,
        )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # The first evaluation has the plain names; those of the others would replace its pictures.
        name = self._name(trainer) if self._is_further(trainer) else ""
        with warn_if_not_written(), atomic_file(directory / name / f"{module.updates:06d}.png") as part:
            figure.savefig(part, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                with warn_if_not_written():
                    tag = "teacher and generator" + (f", {name}" if name else "")
                    logger.experiment.add_figure(tag, figure, module.updates)

    def _is_further(self, trainer: pl.Trainer) -> bool:
        """Whether an evaluation before this one draws a grid, too."""
        return [each for each in self._evaluations(trainer) if each.columns].index(self) > 0


class _Together(Pace):
    """All ranks generate in the same rounds, also with weights in shards, and save between them after a signal."""

    def __init__(self, trainer: pl.Trainer, module: DistillationModule, role: str) -> None:
        self.trainer, self.module, self.role = trainer, module, role

    def rounds(self, batches: int) -> int:
        if self.trainer.world_size == 1:
            return batches
        here = torch.tensor(batches, device=self.trainer.strategy.root_device)
        return int(self.trainer.strategy.reduce(here, reduce_op="max"))

    def round(self) -> AbstractContextManager[None]:
        return self.module.roles.lockstep(self.role)

    def after(self) -> None:
        callbacks: list[Any] = self.trainer.callbacks  # type: ignore[attr-defined]
        for each in callbacks if self.trainer.state.fn == TrainerFn.FITTING else ():
            if isinstance(each, StopOnSignal):
                each.save_early(self.trainer)


def _keep(kept: KeptPictures, *made: Any) -> None:
    with warn_if_not_written():
        kept.keep(*made)


def _of_teacher(module: DistillationModule, steps: int, guidance: float, noise: Tensor, texts: list[str]) -> Tensor:
    return module.generate_teacher(noise, texts, steps, guidance)


def log_figures(trainer: pl.Trainer, module: DistillationModule, measured: dict[str, Any]) -> None:
    """Log figures at this update, once in every logger; callbacks such as ``ModelCheckpoint`` see them too."""
    # Loggers are called here: Lightning would log them at its own interval, not at all or again and again.
    module.log_dict(measured, logger=False, batch_size=1)
    trainer.logged_metrics.update(measured)
    for logger in trainer.loggers:
        logger.log_metrics({name: float(value) for name, value in measured.items()}, step=module.updates)
        logger.save()
