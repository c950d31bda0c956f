"""``fit``: LightningCLI over the distillation methods."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentError
from lightning.pytorch.cli import LightningCLI

import gdmd_lightning.components  # noqa: F401  (makes every class known by its bare name)
from gdmd_lightning.callbacks.interruption import StopOnSignal, interrupted_checkpoint
from gdmd_lightning.commands.restore import describe_module
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import find_config
from gdmd_lightning.methods.base import DistillationModule


class DistillationCLI(LightningCLI):
    """``fit`` of any :class:`DistillationModule` on a :class:`PromptDataModule`."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training alone; scoring and sampling are commands of their own."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def before_fit(self) -> None:
        """Let checkpoints explain themselves; see that one to resume from is one, before any model is loaded."""
        self.model.configuration = describe_module(self.config.fit.model)
        path = self.config.fit.ckpt_path
        if path is not None and str(path) not in ("last", "best", "hpc", "registry"):
            from gdmd_lightning.methods.checkpointing import read_checkpoint

            read_checkpoint(str(path))


def with_found_configs(arguments: Sequence[str]) -> list[str]:
    """The arguments with every ``--config NAME`` replaced by the path of that configuration."""
    out: list[str] = []
    for argument in arguments:
        if out and out[-1] in ("--config", "-c"):
            argument = find_config(argument)
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.removeprefix('--config='))}"
        out.append(argument)
    return out


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
            trainer_defaults={"callbacks": [StopOnSignal()]},
            auto_configure_optimizers=False,
        )
    except ArgumentError as error:
        raise UserError(str(error), where="fit", remedy="see fit --help") from error


def quiet() -> None:
    """Silence what Lightning and torch tell developers and a reader of ours cannot act on."""
    for message in ("LeafSpec", "does not have many workers", "in eval mode", "args parameter is intended"):
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
