"""What a run tells its user: what it will do, how far it is, and what to do with its results."""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from tqdm import tqdm

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.gradient_record import GradientRewardRecord
from gdmd_lightning.callbacks.run_directory import run_directory
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.provenance import named_classes, parsed
from gdmd_lightning.ranges import Positive, ranged

WIDTH = 79
"""One less than the columns of a common terminal: a full last column wraps in some."""
SHOWN = {"loss": "loss", "train/reward_sample": "reward", "train/reward_target": "target reward"}
"""Logged names that are shown, and how."""


@ranged
class Progress(ProgressBar):
    """Progress in updates: a bar in a terminal, and a line every few seconds anywhere else.

    It takes the place of Lightning's progress bar, which counts epochs and batches. ``trainer.enable_progress_bar:
    false`` removes it, and a progress bar among the callbacks of a configuration replaces it. Only the process of
    rank 0 prints.

    Args:
        every_seconds: Seconds between two lines.
    """

    def __init__(self, every_seconds: Positive = 5.0) -> None:
        super().__init__()
        self.every_seconds = every_seconds
        self._enabled = True
        self._bar: tqdm[Any] | None = None
        self._done, self._printed = 0, 0.0
        self._began: float | None = None

    def disable(self) -> None:
        """Print nothing; Lightning calls this in all processes except that of rank 0."""
        self._enabled = False

    def enable(self) -> None:
        """Print again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.clear()
        print(*args, **{"flush": True, **kwargs})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say what the run will do."""
        assert isinstance(pl_module, DistillationModule)
        directory = run_directory(trainer)
        self._done, self._began, self._printed = 0, time.monotonic(), -self.every_seconds
        if not self._enabled:
            return
        for line in description(trainer, pl_module, directory):
            self.print(line)
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=trainer.max_steps if trainer.max_steps > 0 else None,
                initial=pl_module.updates,
                ncols=WIDTH,
                bar_format="{n_fmt}/{total_fmt} |{bar}|{postfix}",
                mininterval=0.2,
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the update; values are read from the device only when they are shown."""
        assert isinstance(pl_module, DistillationModule)
        self._done += 1  # a run that is rolled back does some updates twice
        if not self._enabled or self._began is None:
            return
        now, updates = time.monotonic() - self._began, pl_module.updates
        wait = 0.2 if self._bar is not None else self.every_seconds
        if now - self._printed < wait and updates != trainer.max_steps:
            return
        self._printed = now
        seconds = now / self._done
        values = [f"{name} {float(trainer.callback_metrics[key]):.4g}" for key, name in SHOWN.items()
                  if key in trainer.callback_metrics]  # fmt: skip
        timing = [f"{seconds:.3g} s/update"]
        if trainer.max_steps > 0:
            timing.append(f"{clock(seconds * (trainer.max_steps - updates))} left")
        if self._bar is None:
            total = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
            self.print(f"update {updates}{total}  {'  '.join([*values, *timing])}")
        else:
            self._bar.set_postfix_str("  ".join([*values, *timing])[: WIDTH - 24], refresh=False)
            self._bar.update(updates - self._bar.n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the finished bar."""
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the bar where it stopped, so that the error has its own line."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Report scores and the next commands; earlier hooks come before the last checkpoint."""
        assert isinstance(pl_module, DistillationModule)
        directory = run_directory(trainer)
        if self._enabled:
            if self._began is None:  # Lightning does not start to train
                self.print(f"nothing to do: {pl_module.updates} updates are done, and max_steps is {trainer.max_steps}")
            else:
                took = clock(time.monotonic() - self._began)
                self.print(f"{self._done} updates in {took}, {pl_module.updates} in all")
            self._began = None
            for line in results(trainer, pl_module, directory):
                self.print(line)


def clock(seconds: float) -> str:
    """A duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"


def description(trainer: pl.Trainer, module: DistillationModule, directory: Path) -> list[str]:
    """What a run will do, in a few lines."""
    batch = ""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PromptDataModule):
        batch = f" of {data.samples * trainer.world_size} samples ({data.group_size} per prompt)"
    weights = f"LoRA of rank {module.lora.rank}" if module.lora is not None else "all weights"
    resumed = f", from update {module.updates}" if module.updates else ""
    goal = f"{trainer.max_steps} updates" if trainer.max_steps > 0 else "updates without a limit"
    device = module.device.type if trainer.world_size == 1 else f"{trainer.world_size} x {module.device.type}"
    return [
        f"{type(module).__name__}: {module.steps} steps, {module.height}x{module.width} pixels, {weights}",
        f"teacher: {module.family.path}",
        f"training: {goal}{batch}{resumed}, on {device}, precision {trainer.precision}",
        f"run: {directory}",
        *(
            f"checkpoints: {when} in {keeper.dirpath or directory / 'checkpoints'}"
            for keeper in trainer.checkpoint_callbacks
            if isinstance(keeper, ModelCheckpoint) and (when := _when(trainer, keeper)) is not None
        ),
    ]


def _when(trainer: pl.Trainer, keeper: ModelCheckpoint) -> str | None:
    """When a checkpoint is saved; None where epochs decide."""
    if keeper._every_n_train_steps:
        return f"every {keeper._every_n_train_steps} updates"
    endless = isinstance(trainer.datamodule, PromptDataModule)  # type: ignore[attr-defined]
    ends = not endless or isinstance(trainer.limit_train_batches, int)
    return None if ends else "at the end only, as it has no every_n_train_steps,"


def results(trainer: pl.Trainer, module: DistillationModule, directory: Path) -> list[str]:
    """The last scores and the teacher's, and what to do with the run: commands that can be copied."""
    teacher: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GenerationEvaluation):
            teacher |= callback.teacher
    lines = [
        f"score {name}: {value:.4f}" + (f"  (teacher: {teacher[name]:.4f})" if name in teacher else "")
        for name, value in sorted(module.provenance.scores.items())
    ]
    keepers = [k for k in trainer.checkpoint_callbacks if isinstance(k, ModelCheckpoint) and k.save_last]
    # A resumed run knows the paths of the earlier one, whether it saves there itself or not.
    saved = [k for k in keepers if k._last_checkpoint_saved]
    done = module.updates >= trainer.max_steps and not trainer.interrupted
    if not saved or not done or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return lines
    command = "python -m gdmd_lightning"
    last = shlex.quote(saved[0].last_model_path)
    trust = "".join(f" --trust {shlex.quote(name)}" for name in _own_modules(module))
    whole = next((shlex.quote(k.last_model_path) for k in saved if not k.save_weights_only), None)
    if whole is not None:
        config = shlex.quote(f"{directory}/config.yaml")
        longer = f"fit --config {config} --ckpt_path {whole} --trainer.max_steps {2 * module.updates}"
        lines.append(f"train longer: {command} {longer}")
    lines += [
        f"sample: {command} sample {last} PROMPTS {shlex.quote(f'{directory}/samples')}{trust}",
        f"export: {command} export {last} {shlex.quote(f'{directory}/pipeline')}{trust}",
    ]
    if any(isinstance(c, GradientRewardRecord) for c in trainer.callbacks):  # type: ignore[attr-defined]
        # The notebook runs in its own directory.
        run = shlex.quote(str(directory.absolute()))
        lines.append(f"look at the record: GDMD_RUN={run} jupyter lab notebooks/gradient_rewards.ipynb")
    return lines


def _own_modules(module: DistillationModule) -> list[str]:
    """Modules of the user's classes that the checkpoint names; its reward is not needed to sample or export."""
    model = (parsed(module.provenance.configuration) or {}).get("model") or {}
    settings = {name: value for name, value in (model.get("init_args") or {}).items() if name != "reward"}
    named = named_classes({**model, "init_args": settings})
    return sorted({name.rpartition(".")[0] for name in named if name.partition(".")[0] != "gdmd_lightning"})
