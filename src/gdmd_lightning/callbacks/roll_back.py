"""Continue a running training from an earlier checkpoint of it, in place, on another course."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.methods.lightning import RoleModule
from gdmd_lightning.streams import named_seed


def best_checkpoint(trainer: pl.Trainer) -> Path | None:
    """The best checkpoint of the first ``ModelCheckpoint`` that monitors a figure; None if there is none yet."""
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint) and keeper.monitor is not None and keeper.best_model_path:
            return Path(keeper.best_model_path)
    return None


def restore_in_place(trainer: pl.Trainer, module: RoleModule, path: Path) -> None:
    """Load weights, averages, optimizers, schedules and counters, as a resumed run does; call at the end of an update.

    The data module keeps its position: the prompts are those that would have come next.
    """
    connector: Any = trainer._checkpoint_connector
    given = connector._ckpt_path
    connector.resume_start(str(path), weights_only=True)
    connector.restore_model()
    connector.restore_training_state()
    connector.resume_end()
    connector._ckpt_path = given
    trainer.fit_loop.restarting = False  # the loop goes on, it does not start
    module._random_states = None  # new random numbers are wanted, so that the failure does not repeat
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if isinstance(data, PromptDataModule):
        data.forget_counter()
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint):
            # Otherwise it would not save an update whose number it has saved before.
            keeper._last_global_step_saved = 0


def change_course(trainer: pl.Trainer, module: RoleModule, seed: int, turn: int, factor: float) -> None:
    """Give a run new random streams and smaller learning rates, in all updates from now on.

    Call it with the optimizers as the module's settings make them: after :func:`restore_in_place` or a resume.

    Args:
        trainer: The trainer.
        module: The module.
        seed: The seed of the run's settings.
        turn: Number of the roll-back, from 1.
        factor: Factor on all learning rates, relative to the settings.
    """
    module.seed = named_seed(seed, "rolled back", turn) % 2**32
    # Step fresh schedules from the smaller rates: a resumed run then has the same rates to the bit.
    for live, optimizer, fresh in zip(
        trainer.lr_scheduler_configs, trainer.optimizers, module.configure_optimizers(), strict=True
    ):
        schedule: Any = fresh["lr_scheduler"]["scheduler"]
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
        for group in fresh["optimizer"].param_groups:
            group["lr"], group["initial_lr"] = group["lr"] * factor, group["initial_lr"] * factor
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(module.updates):
                schedule.step()
        live.scheduler.load_state_dict(schedule.state_dict())
        for group, new in zip(optimizer.param_groups, fresh["optimizer"].param_groups, strict=True):
            group["lr"], group["initial_lr"] = new["lr"], new["initial_lr"]
