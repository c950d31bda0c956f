"""Training from arguments: LightningCLI over the distillation methods, callable from Python."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from omegaconf.errors import OmegaConfBaseException

import gdmd_lightning.components  # noqa: F401  (registers every class under its bare name)
from gdmd_lightning.callbacks.interruption import StopOnSignal
from gdmd_lightning.callbacks.known_figures import CheckMonitors, no_figure
from gdmd_lightning.callbacks.last_checkpoint import SaveLastUpdate
from gdmd_lightning.callbacks.progress import Progress
from gdmd_lightning.callbacks.run_directory import CHECKPOINTS, RunDirectory, run_directory
from gdmd_lightning.callbacks.settings import SaveConfig
from gdmd_lightning.callbacks.spread import WarnWithoutSpread
from gdmd_lightning.callbacks.summary import count_whole
from gdmd_lightning.configuration.configs import fit_arguments
from gdmd_lightning.configuration.launching import (
    check_launcher,
    check_requeued,
    check_trainer,
    no_command_line,
)
from gdmd_lightning.configuration.lost_ranks import is_lost_rank
from gdmd_lightning.configuration.messages import readable_error
from gdmd_lightning.configuration.noise import quiet
from gdmd_lightning.configuration.numbers import check_configuration
from gdmd_lightning.configuration.references import (
    ReferencingParser,
    environment_references,
    with_environment,
    with_references,
)
from gdmd_lightning.configuration.restore import describe_module
from gdmd_lightning.configuration.resuming import NAMED, place_given, resolve_checkpoint
from gdmd_lightning.configuration.seeds import share_seed
from gdmd_lightning.configuration.suggestions import arguments_of
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.engines.deepspeed import check_stages
from gdmd_lightning.engines.fsdp import check_sharding
from gdmd_lightning.errors import UserError, WriteError
from gdmd_lightning.garbage import collect_as_usual
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import WholeCheckpoints, read_checkpoint
from gdmd_lightning.methods.provenance import Provenance
from gdmd_lightning.strategies import MultiEngineDeepSpeedStrategy

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
NO_METRIC = re.compile(r"Early stopping conditioned on metric `(.*?)` which is not available")
"""What Lightning says of an ``EarlyStopping`` whose figure is not there when an epoch ends."""
CallbackT = TypeVar("CallbackT", bound=Callback)
PARSER = {"parser_mode": "omegaconf", "exit_on_error": False}


class DistillationCLI(LightningCLI):
    """``fit`` of any :class:`DistillationModule` on a :class:`PromptDataModule`.

    Args:
        command: The command whose ``--help`` an error points to.
        cli: Arguments of :class:`LightningCLI`.
    """

    def __init__(self, *cli: Any, command: str = "fit", **options: Any) -> None:
        self.command = command
        super().__init__(*cli, **{**options, "parser_class": ReferencingParser, "parser_kwargs": PARSER})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, check all numbers, and keep the arguments: they tell what the user gave."""
        self._arguments = list(args)
        try:
            super().parse_arguments(parser, [with_environment(each) for each in args])
        except (ArgumentError, OmegaConfBaseException, SyntaxError) as error:
            # Here the parser that knows the right arguments is at hand.
            fit = parser._subcommands_action._name_parser_map["fit"]  # type: ignore[union-attr]
            raise readable_error(error, self.command, arguments_of(fit)) from error
        check_configuration(self.config.fit)
        check_trainer(self.config.fit.trainer)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Training only; scoring and sampling are separate commands."""
        return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}}

    def _parse_ckpt_path(self) -> None:
        """Check the checkpoint to resume from; Lightning would take the model's arguments from it."""
        path = self.config.fit.ckpt_path if "subcommand" in self.config else None
        if path is not None and str(path) not in NAMED:
            read_checkpoint(str(path), in_memory=False)

    def _dump_config(self) -> None:
        """What ``save_hyperparameters`` saves; Lightning would check the whole configuration once more for it."""
        if not hasattr(self, "config_dump"):
            dumped = self.parser.dump(self.config, skip_link_targets=False, skip_unset=False, skip_validation=True)
            self.config_dump = yaml.safe_load(dumped)["fit"]

    def _set_seed(self) -> None:
        """Seed everything, and let that number be the seed of model and data, unless they have their own."""
        super()._set_seed()
        share_seed(self.config.fit)

    def instantiate_classes(self) -> None:
        """Build everything; report what a constructor refuses as an error in the configuration."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, ModuleNotFoundError, MisconfigurationException) as error:
            raise readable_error(error, "fit") from error
        except RuntimeError as error:
            if (found := re.search(r"more than one stateful callback of type `(\w+)`", str(error))) is None:
                raise
            raise UserError(
                f"two {found[1]} are the same, so a checkpoint could not keep their states apart",
                where="trainer.callbacks",
                remedy="remove one, or give them different settings, such as another interval or figure",
            ) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes checkpoints atomically and whose DDP processes expect unused parameters."""
        callbacks = self.config_init.fit.trainer.callbacks
        given = callbacks if isinstance(callbacks, list) else [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in given)  # the trainer adds its own to this list
        trainer = super().instantiate_trainer(**kwargs)
        if not has_bar:
            use_progress(trainer)
        # The run's directory must be known, and say what the run is, before any other callback writes to it. The
        # checkpoint of a signal is written last, with the states that the others have after the update.
        first = (RunDirectory, SaveConfig)
        trainer.callbacks.sort(  # type: ignore[attr-defined]
            key=lambda each: [isinstance(each, StopOnSignal), *(not isinstance(each, kind) for kind in first)]
        )
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        if isinstance(trainer.strategy, DDPStrategy):
            # A backward pass reaches one role; DDP would wait for the gradients of the others. Not a default: the
            # command line gives a class all of its arguments, so this one is False unless a user sets it.
            trainer.strategy._ddp_kwargs["find_unused_parameters"] = True
        if isinstance(trainer.strategy, MultiEngineDeepSpeedStrategy):
            count_whole(trainer)
        return trainer

    def before_fit(self) -> None:
        """Store the configuration in checkpoints; refuse what Lightning would reject less clearly."""
        settings = self.config.fit
        references = environment_references(self._arguments)
        self._parser("fit").references = references  # type: ignore[attr-defined]
        self.model.provenance = Provenance(
            with_references(describe_module(settings.model), references),
            references.get(str(settings.data.source), str(settings.data.source)),
        )
        if self.trainer.gradient_clip_val:
            raise UserError(
                "not supported: each role has its own optimizer",
                where="trainer.gradient_clip_val",
                remedy="set model.generator.gradient_clip and model.fake_score.gradient_clip",
            )
        times, size = self.trainer.accumulate_grad_batches, settings.data.batch_size
        if times != 1:
            remedy = (
                f"use model.accumulate {times}, or data.batch_size {times * size} with model.micro_batch_size {size}: "
                "the same update"
            )
            if (every := settings.data.global_batch_size) is not None:
                remedy = f"use data.global_batch_size {times * every}: a rank has {size} of them in memory at once"
            raise UserError(
                f"it is {times}, but an update takes several optimizer steps",
                where="trainer.accumulate_grad_batches",
                remedy=remedy,
            )
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise no_command_line(settings.trainer.strategy)  # "auto" chooses such a one in a notebook
        check_launcher(self.trainer)
        if isinstance(self.trainer.strategy, MultiEngineDeepSpeedStrategy):
            check_stages(self.trainer.strategy, self.model.role_specs(), adapters=self.model.lora is not None)
        check_sharding(self.trainer.strategy, self.model.role_specs())
        self._choose_directory()

    def _choose_directory(self) -> None:
        """Find the checkpoint to resume from and decide the run's directory."""
        given, resumed, updates = self.config.fit.ckpt_path, None, 0
        if given is not None:
            resumed = resolve_checkpoint(str(given), self.trainer)
            if resumed is not None:
                updates = int(read_checkpoint(str(resumed), in_memory=False)["global_step"])
            self.config_init.fit.ckpt_path = None if resumed is None else str(resumed)
        if resumed is None:
            check_requeued(self.trainer)
        _of_type(self.trainer, RunDirectory).choose(
            self.trainer,
            resumed,
            updates,
            placed=place_given(self._arguments),
            configuration=_of_type(self.trainer, SaveConfig).text() if given == "last_or_new" else None,
        )

    def fit(self, *args: Any, **kwargs: Any) -> None:
        """Train; report a failed write, code that exits, or a rank that has ended as an error."""
        collect_as_usual()
        try:
            self.trainer.fit(*args, **kwargs)
        except SystemExit as error:
            if isinstance(error.__context__, KeyboardInterrupt):
                raise error.__context__ from None  # Lightning exits this way after Ctrl-C while loading
            if _of_type(self.trainer, StopOnSignal).received:
                raise
            raise UserError(
                f"the run was ended by sys.exit({error.code!r}) after {self.model.updates} updates",
                where="fit",
                remedy="raise an error in the reward, callback or data set instead",
            ) from error
        except OSError as error:
            if error.errno not in FULL or isinstance(error, UserError):
                raise
            where = str(error.filename or run_directory(self.trainer))
            remedy = "free disk space, or give the run another place"
            raise WriteError(f"cannot be written: {error.strerror}", where=where, remedy=remedy) from error
        except RuntimeError as error:
            if (found := NO_METRIC.match(str(error))) is not None:
                logged = self.trainer.callback_metrics
                raise no_figure(found[1], "EarlyStopping.monitor", self.model.updates, logged) from error
            if not is_lost_rank(error):
                raise
            last = self._last_checkpoint()
            raise UserError(
                f"lost its connection to another rank, which has ended, after {self.model.updates} updates",
                where=f"rank {self.trainer.global_rank}",
                remedy="see the output of that rank" + (f"; resume with --ckpt_path {last}" if last else ""),
            ) from error

    def _last_checkpoint(self) -> Path | None:
        """The run's ``last.ckpt``, if there is one; asks no other rank."""
        place = _of_type(self.trainer, RunDirectory).path
        last = None if place is None else place / CHECKPOINTS / "last.ckpt"
        return last if last is not None and last.exists() else None


def use_progress(trainer: Trainer) -> None:
    """Put :class:`Progress` in the place of the bar that Lightning added by itself, if it added one."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if trainer.progress_bar_callback is not None:
        callbacks.remove(trainer.progress_bar_callback)
        callbacks.insert(0, Progress())


class _ParsingCLI(DistillationCLI):
    """``fit`` up to its parsed configuration; builds no trainer, which would look for GPUs."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    def _set_seed(self) -> None:
        pass


def run(arguments: Sequence[str]) -> DistillationCLI:
    """Run ``fit`` with these arguments.

    Returns:
        The command line after training; its ``trainer`` and ``model`` are the trained ones.

    Raises:
        UserError: If the configuration is wrong.
    """
    quiet()
    place = RunDirectory()
    always = [place, StopOnSignal(), SaveLastUpdate(), WarnWithoutSpread(), CheckMonitors()]
    try:
        return DistillationCLI(
            DistillationModule,
            PromptDataModule,
            # Read a checkpoint to resume from as tensors and plain values only.
            args=["fit", "--weights_only=true", *fit_arguments(arguments)],
            subclass_mode_model=True,
            save_config_callback=SaveConfig,
            trainer_defaults={"callbacks": always},
            auto_configure_optimizers=False,
        )
    except MisconfigurationException as error:
        raise readable_error(error, "fit") from error
    finally:
        place.release()


def parse(arguments: Sequence[str], command: str = "fit") -> Any:
    """The configuration that ``fit`` would get from these arguments; nothing is built.

    Args:
        arguments: As for ``fit``.
        command: The command whose ``--help`` an error points to.

    Raises:
        UserError: If the arguments are wrong.
    """
    return parsing_cli(arguments, command).config.fit


def parsing_cli(arguments: Sequence[str], command: str = "fit") -> DistillationCLI:
    """The command line that :func:`parse` uses, after parsing."""
    quiet()
    return _ParsingCLI(
        DistillationModule,
        PromptDataModule,
        command=command,
        args=["fit", *fit_arguments(arguments, command)],
        subclass_mode_model=True,
        save_config_callback=None,
        seed_everything_default=False,
        auto_configure_optimizers=False,
    )


def stopped_by(cli: DistillationCLI) -> StopOnSignal:
    """Whether and by which signal the run was stopped."""
    return _of_type(cli.trainer, StopOnSignal)


def _of_type(trainer: Trainer, kind: type[CallbackT]) -> CallbackT:
    """The trainer's callback of a type that every run has."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, kind))
