"""What a run was asked to do: ``config.yaml`` in its directory, and hyper-parameters in its loggers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import yaml
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.run_directory import CONFIG, run_directory
from gdmd_lightning.files import write_atomically

CHOSEN_BY_RUN = ("trainer.logger", "trainer.default_root_dir", "ckpt_path")
"""Settings that say where a run is, not what it does; they would differ in every row of a table."""


class SaveConfig(SaveConfigCallback):
    """Writes ``config.yaml`` when training starts, complete or not at all, and gives every logger the settings.

    Texts taken from the environment are written as references. TensorBoard lists the settings of a run in its tab
    HPARAMS, next to its last loss and scores.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "save_to_log_dir": False})

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write nothing yet: a checkpoint that is refused later must leave its run as it was."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write once, after a checkpoint was restored."""
        if trainer.is_global_zero and not self.already_saved:
            self.save_config(trainer, pl_module, "fit")
            self.already_saved = True

    def text(self) -> str:
        """The content of ``config.yaml``."""
        return self.parser.dump(self.config, skip_unset=False, skip_validation=True)  # it was checked when parsed

    def save_config(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Write and log, on rank 0 only."""
        text = self.text()
        write_atomically(run_directory(trainer) / CONFIG, text)
        settings = yaml.safe_load(text)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                _list_in_tensorboard(logger, settings, ["loss", *_scores(trainer)])
            else:
                logger.log_hyperparams(settings)


def _list_in_tensorboard(logger: TensorBoardLogger, settings: dict[str, Any], figures: list[str]) -> None:
    # The logger's own method flattens no lists and logs a first value of each figure, which nobody measured.
    from torch.utils.tensorboard.summary import hparams

    values = {key: value for key, value in flat(settings) if not key.startswith(CHOSEN_BY_RUN)}
    for summary in hparams(values, dict.fromkeys(figures, 0.0)):
        logger.experiment._get_file_writer().add_summary(summary)


def _scores(trainer: pl.Trainer) -> Iterator[str]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GenerationEvaluation):
            yield from (f"eval/{score.name}/overall" for score in callback.scores)


def flat(settings: Any, key: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Settings by the dotted keys that the command line takes; items of a list are numbered from 0."""
    if isinstance(settings, dict | list):
        items = settings.items() if isinstance(settings, dict) else enumerate(settings)
        for name, value in items:
            yield from flat(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, settings if isinstance(settings, bool | int | float | str) else str(settings)
