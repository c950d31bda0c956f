"""``fit``: LightningCLI over the distillation methods."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentError
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from omegaconf.errors import OmegaConfBaseException

import gdmd_lightning.components  # noqa: F401  (makes every class known by its bare name)
from gdmd_lightning.callbacks.interruption import StopOnSignal, interrupted_checkpoint
from gdmd_lightning.callbacks.last_checkpoint import SaveLastUpdate
from gdmd_lightning.commands.complaints import complaint
from gdmd_lightning.commands.configs import with_found_configs
from gdmd_lightning.commands.restore import describe_module
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import Provenance, WholeCheckpoints, read_checkpoint


class DistillationCLI(LightningCLI):
    """``fit`` of any :class:`DistillationModule` on a :class:`PromptDataModule`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training alone; scoring and sampling are commands of their own."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def _parse_ckpt_path(self) -> None:
        """See that a checkpoint to resume from is one; Lightning would take the model's arguments from it."""
        path = self.config.fit.ckpt_path if "subcommand" in self.config else None
        if path is not None and str(path) not in ("last", "best", "hpc", "registry"):
            read_checkpoint(str(path), in_memory=False)

    def instantiate_classes(self) -> None:
        """Build everything; what a constructor refuses is the configuration's mistake."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, MisconfigurationException) as error:
            raise complaint(error, "fit") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer whose checkpoints are written whole or not at all, and whose processes know of two networks."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        if isinstance(trainer.strategy, DDPStrategy):
            # A backward reaches either the generator or the fake score; DDP would wait for the other's gradients.
            trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
        return trainer

    def before_fit(self) -> None:
        """Let checkpoints explain themselves; refuse what Lightning would misread or refuse less clearly."""
        settings = self.config.fit
        self.model.provenance = Provenance(describe_module(settings.model), str(settings.data.source))
        if self.trainer.gradient_clip_val:
            raise UserError(
                "it has no meaning with two optimizers",
                where="trainer.gradient_clip_val",
                remedy="set model.generator.gradient_clip and model.critic.gradient_clip",
            )


def run(arguments: Sequence[str]) -> DistillationCLI:
    """Run ``fit`` with these arguments; the finished trainer and model are on what is returned.

    Raises:
        UserError: If the configuration is wrong.
    """
    quiet()
    try:
        return DistillationCLI(
            DistillationModule,
            PromptDataModule,
            # A checkpoint to resume from is read as tensors and plain values, nothing else.
            args=["fit", "--weights_only=true", *with_found_configs(arguments)],
            subclass_mode_model=True,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={"parser_mode": "omegaconf", "exit_on_error": False},
            trainer_defaults={"callbacks": [StopOnSignal(), SaveLastUpdate()]},
            auto_configure_optimizers=False,
        )
    except (ArgumentError, OmegaConfBaseException, MisconfigurationException) as error:
        raise complaint(error, "fit") from error
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # Lightning's own exit after Ctrl-C while loading
            raise KeyboardInterrupt from error
        raise


def quiet() -> None:
    """Silence what Lightning and torch tell developers and a reader of ours cannot act on."""
    for message in (
        "LeafSpec",
        "does not have many workers",
        "in eval mode",
        "args parameter is intended",
        "with manual optimization",
    ):
        warnings.filterwarnings("ignore", message=f".*{message}.*")
    for noisy in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(noisy).addFilter(lambda record: "Tip:" not in record.getMessage())


def signal_received(cli: DistillationCLI) -> int:
    """The signal that ended the run, or 0."""
    return next(c.received for c in cli.trainer.callbacks if isinstance(c, StopOnSignal))  # type: ignore[attr-defined]


def main(arguments: list[str]) -> int:
    """Run the command."""
    cli = run(arguments)
    number = signal_received(cli)
    if number:
        print(f"stopped by signal {number}; resume with --ckpt_path {interrupted_checkpoint(cli.trainer)}")
        return 128 + number
    return 0
