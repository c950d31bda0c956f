"""Arms of a comparison: named settings, each trained to a budget, scored on the way, and resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.pytorch import Trainer

from gdmd_lightning.callbacks.settings import CHOSEN_BY_RUN
from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.configs import fit_arguments
from gdmd_lightning.configuration.messages import readable_error
from gdmd_lightning.configuration.references import environment_references
from gdmd_lightning.configuration.restore import build_module, load_module
from gdmd_lightning.configuration.training import DistillationCLI
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import StoppedBySignal, UserError, WriteError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.provenance import Provenance, named_classes, read_provenance
from gdmd_lightning.methods.resuming import flattened
from gdmd_lightning.studies.contestants import student
from gdmd_lightning.studies.recorded import ANOTHER_OUT, record_settings
from gdmd_lightning.studies.scorecards import Row, TrainingCost, read_scorecard, score, write_scorecard
from gdmd_lightning.studies.tasks import Task
from gdmd_lightning.studies.timed_checkpoint import TimedCheckpoint, seconds_in
from gdmd_lightning.studies.watch import Watch

SECTIONS = {"trainer": Trainer, "data": PromptDataModule, "watch": Watch}
"""Classes of the sections of :meth:`Run.settings`, besides the method, which the settings name."""


def option(key: str, value: Any) -> str:
    """A dotted setting as an argument of ``fit``: text as it is, anything else as JSON."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


@dataclass(frozen=True)
class Arm:
    """A setting of a training.

    Args:
        configs: Names or paths of configurations; a later one overrides an earlier one.
        fit: Values by dotted key, as on ``fit``'s command line, such as ``{"model.lambda_policy": 5}``; override the
            configurations.
    """

    configs: list[str]
    fit: dict[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The arm as arguments of ``fit``."""
        configs = [part for name in self.configs for part in ("--config", name)]
        return configs + [option(key, value) for key, value in self.fit.items()]

    def check(self, name: str, extra: Sequence[str], task: Task) -> None:
        """Fail early if ``fit`` would refuse the arguments, or the task its pictures; builds all but the weights.

        Args:
            name: The arm's name.
            extra: Further arguments of ``fit``.
            task: What it is scored on.

        Raises:
            UserError: If it would; the message names the arm.
        """
        try:
            settings = training.parse([*self.arguments, *extra])
            data = PromptDataModule(**vars(settings.data))
            module = build_module(settings.model)
            module.check_data(data)
        except (UserError, ArgumentError, ValueError, TypeError) as error:
            raise _of_arm(name, readable_error(error, "fit")) from error
        task.check_size(name, module.height, module.width)


DMD = Arm(["shapes.yaml", "shapes_dmd.yaml"])
GDMD = Arm(["shapes.yaml"])

# No callback that evaluates or records, so that the seconds are the method's own.
UNOBSERVED = {"trainer.enable_progress_bar": False, "trainer.log_every_n_steps": 50}
KEEP_LAST = f"{TimedCheckpoint.__module__}.{TimedCheckpoint.__name__}"
CHOSEN_HERE = ("seed_everything", "ckpt_path", "weights_only", "trainer.max_steps", "trainer.callbacks", *UNOBSERVED)
"""Settings of ``fit`` that a comparison chooses itself: seed, budget and callbacks."""


@dataclass(frozen=True)
class Run:
    """The training of one arm with one seed.

    Args:
        name: The arm's name in tables.
        arm: The setting.
        directory: Where its checkpoints, costs and scores are kept.
        seed: Seed of the run; determines all its random numbers.
        start_from: Checkpoint to start from.
        extra: Further arguments of ``fit``.
    """

    name: str
    arm: Arm
    directory: Path
    seed: int
    start_from: Path | None = None
    extra: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return last_checkpoint(self.directory)

    @property
    def arguments(self) -> list[str]:
        """Arm and further arguments, as arguments of ``fit``."""
        return [*self.arm.arguments, *self.extra]

    def module(self) -> DistillationModule:
        """The module of the last checkpoint, with its averaged generator.

        Besides this package's own classes, it may run those that the arm names: its configurations are the user's.
        """
        named = sorted(set(named_classes(training.parse(self.arguments).model)))
        return load_module(str(self.checkpoint), role="ema", trust=named)

    @property
    def has_begun(self) -> bool:
        """Whether its directory has a checkpoint or a score."""
        return self.checkpoint.is_file() or any(self.directory.glob("scores_*.json"))

    def settings(self, watch: Watch) -> dict[str, Any]:
        """What it is trained and scored with, as plain values by dotted key; without place, seed and budget.

        Values that come from the environment are references, since they are written.

        Args:
            watch: What it is scored on besides the test prompts.
        """
        cli = training.parsing_cli(self.arguments)
        parser: Any = cli._parser("fit")
        parser.references = environment_references(fit_arguments(self.arguments))
        # It was checked when parsed.
        fit = yaml.safe_load(parser.dump(cli.config.fit, skip_unset=False, skip_validation=True))
        start = () if self.start_from is None else ("model.start_from",)
        chosen = tuple(f"{key}." for key in (*CHOSEN_BY_RUN, *CHOSEN_HERE, *start))
        kept = {key: value for key, value in flattened(fit) if not f"{key}.".startswith(chosen)}
        return kept | dict(flattened(asdict(watch), "watch"))

    def scorecard(self, budget: int) -> Path:
        """The scores when ``budget`` network evaluations were spent."""
        return self.directory / f"scores_{budget}.json"

    def cost(self, budget: int) -> Path:
        """What the training cost up to there, kept in case scoring is interrupted."""
        return self.directory / f"cost_{budget}.json"

    def row(self, budget: int, task: Task, count: int) -> Row:
        """The scores of a finished run.

        Raises:
            UserError: If it was scored on other prompts.
        """
        (row,) = read_scorecard(self.scorecard(budget), prompts=task.prompts, count=count).rows
        return row


def last_checkpoint(directory: Path) -> Path:
    """The last checkpoint of the training whose logs are in ``directory``."""
    return directory / "checkpoints" / "last.ckpt"


def train(directory: Path, arguments: Sequence[str]) -> DistillationCLI:
    """Run ``fit`` with its logs in ``directory``.

    Raises:
        StoppedBySignal: If a signal ended the run.
    """
    logger = {"save_dir": str(directory.parent), "name": directory.name, "version": "."}
    place = [option(f"trainer.logger.init_args.{key}", value) for key, value in logger.items()]
    cli = training.run([*arguments, *place])
    received = training.stopped_by(cli).received
    if received:
        raise StoppedBySignal(received)
    return cli


def run_arm(run: Run, budgets: Sequence[int], task: Task, count: int, watch: Watch) -> None:
    """Train an arm to each budget in turn and score it there; continue from what its directory already has.

    Args:
        run: The run.
        budgets: Network evaluations, increasing.
        task: What it is scored on.
        count: Test prompts.
        watch: What to measure besides.

    Raises:
        UserError: If the directory has a longer run, or scores on other prompts.
        StoppedBySignal: If a signal ended the training.
    """
    earlier: TrainingCost | None = None
    if not run.has_begun:
        record_settings(run.directory, run.settings(watch))
    for budget in budgets:
        if not run.scorecard(budget).is_file():
            if not run.cost(budget).is_file():
                write_atomically(run.cost(budget), json.dumps(asdict(_train_named(run, budget, earlier))) + "\n")
            generator = student(run.name, run.module())
            card = score([generator], task, count, watch=watch)
            cost = _read_cost(run.cost(budget))
            _check_length(run, budget, cost)
            rows = tuple(replace(row, training=cost) for row in card.rows)
            write_scorecard(replace(card, rows=rows), run.scorecard(budget))
        earlier = run.row(budget, task, count).training


def _read_cost(path: Path) -> TrainingCost:
    return TrainingCost(**json.loads(path.read_text(encoding="utf-8")))


def _content(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint without its tensors in memory; one of no update if there is none."""
    if not checkpoint.is_file():
        return {"provenance": {}}
    return read_checkpoint(str(checkpoint), in_memory=False)


def _check_length(run: Run, budget: int, cost: TrainingCost) -> None:
    """Fail if the last checkpoint is not the one whose cost was written at this budget."""
    there = read_provenance(_content(run.checkpoint)).evaluations
    if there != cost.evaluations:
        trained = f"trained for {there} network evaluations; {budget} requested"
        raise UserError(trained, where=str(run.checkpoint), remedy=ANOTHER_OUT)


def _of_arm(name: str, error: UserError) -> UserError:
    """The error with the arm's name, since several arms have the same keys."""
    where = f"{name}: {error.where}" if error.where else name
    return UserError(error.what, where=where, remedy=error.remedy)


def _train_named(run: Run, budget: int, earlier: TrainingCost | None) -> TrainingCost:
    """As :func:`_train`; errors in the arm's settings have its name."""
    try:
        return _train(run, budget, earlier)
    except WriteError:
        raise
    except UserError as error:
        raise _of_arm(run.name, error) from error


def _train(run: Run, budget: int, earlier: TrainingCost | None) -> TrainingCost:
    """Train until the budget is spent; what all updates so far cost; those to the previous budget cost ``earlier``."""
    there = _content(run.checkpoint)
    before = read_provenance(there)
    if before.updates and before.evaluations - before.evaluations / before.updates >= budget:
        trained = f"trained for {before.evaluations} network evaluations; {budget} requested"
        raise UserError(trained, where=str(run.checkpoint), remedy=ANOTHER_OUT)
    seconds = _seconds(there, before, earlier)
    keep = {"class_path": KEEP_LAST, "init_args": {"seconds": seconds}}
    stop = {"class_path": "EvaluationBudget", "init_args": {"evaluations": budget}}
    settings: dict[str, Any] = {
        "trainer.max_steps": -1,
        "trainer.max_epochs": -1,
        "trainer.callbacks": [keep, stop],
        "seed_everything": run.seed,
        **UNOBSERVED,
    }
    if run.start_from is not None:
        settings["model.start_from"] = str(run.start_from)
    if before.updates:
        settings["ckpt_path"] = str(run.checkpoint)
    began = time.perf_counter()
    cli = train(run.directory, [*run.arm.arguments, *(option(*item) for item in settings.items()), *run.extra])
    here = time.perf_counter() - began - _keeper(cli).saving
    done = read_provenance(_content(run.checkpoint))
    return TrainingCost(done.updates, done.evaluations, None if seconds is None else seconds + here)


def _seconds(content: dict[str, Any], before: Provenance, earlier: TrainingCost | None) -> float | None:
    """Seconds of all updates in a checkpoint; None if they are not known."""
    if not before.updates:
        return 0.0
    if earlier is not None and earlier.evaluations == before.evaluations:
        return earlier.seconds
    return seconds_in(content)


def _keeper(cli: DistillationCLI) -> TimedCheckpoint:
    callbacks = cli.trainer.callbacks  # type: ignore[attr-defined]
    return next(callback for callback in callbacks if isinstance(callback, TimedCheckpoint))
