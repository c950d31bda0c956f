"""Arms of a comparison: named settings, each trained and scored in a directory, and resumable."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.configuration.training import DistillationCLI
from gdmd_lightning.errors import StoppedBySignal, UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.studies.contestants import student
from gdmd_lightning.studies.scorecards import Row, TrainingCost, read_scorecard, score, write_scorecard
from gdmd_lightning.studies.tasks import Task

ANOTHER_OUT = "use another --out"


def option(key: str, value: Any) -> str:
    """A dotted setting as an argument of ``fit``: text as it is, anything else as JSON."""
    return f"--{key}={value if isinstance(value, str) else json.dumps(value)}"


@dataclass(frozen=True)
class Arm:
    """A named setting of a comparison.

    Args:
        name: The arm's name in tables.
        configs: Names or paths of configurations; a later one overrides an earlier one.
        overrides: Values by dotted key, such as ``{"model.lambda_policy": 5}``; override the configurations.
    """

    name: str
    configs: tuple[str, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def arguments(self) -> list[str]:
        """The arm as arguments of ``fit``."""
        configs = [part for name in self.configs for part in ("--config", name)]
        return configs + [option(key, value) for key, value in self.overrides.items()]


DMD = Arm("DMD", ("shapes.yaml", "shapes_dmd.yaml"))
GDMD = Arm("GDMD", ("shapes.yaml",))


def _variant(arm: Arm, name: str, overrides: Mapping[str, Any]) -> Arm:
    """An arm with other settings of the model."""
    return replace(arm, name=f"{arm.name}, {name}", overrides={f"model.{key}": v for key, v in overrides.items()})


ARMS = {
    arm.name: arm
    for arm in (
        DMD,
        _variant(DMD, "all levels", {"matching.interval": "whole"}),
        _variant(DMD, "Euler steps", {"sampler": "ODE"}),
        _variant(DMD, "Euler steps, all levels", {"sampler": "ODE", "matching.interval": "whole"}),
        GDMD,
        _variant(GDMD, "lambda 0", {"lambda_policy": 0}),
        _variant(GDMD, "lambda 5", {"lambda_policy": 5}),
        _variant(GDMD, "lambda 10", {"lambda_policy": 10}),
        _variant(GDMD, "strata not centered", {"advantages.center_strata": False}),
        _variant(GDMD, "lambda 10, strata not centered", {"lambda_policy": 10, "advantages.center_strata": False}),
        _variant(GDMD, "one target", {"targets.size": 1}),
        _variant(GDMD, "four targets", {"targets.size": 4}),
        _variant(GDMD, "weighted", {"policy.form": "weighted"}),
        _variant(GDMD, "policies at the state", {"policy.at": "state"}),
        _variant(GDMD, "groups of a state", {"advantages.compare": "state"}),
        _variant(GDMD, "against the sample", {"advantages.compare": "sample"}),
        _variant(GDMD, "groups over snapshots", {"targets.over": "snapshot"}),
        _variant(GDMD, "groups over both", {"targets.over": "both"}),
    )
}

# No callback that evaluates or records, so that the seconds and evaluations are the method's own.
UNOBSERVED = {
    "trainer.enable_progress_bar": False,
    "trainer.log_every_n_steps": 50,
    "trainer.callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "save_top_k": 0}}],
}


@dataclass(frozen=True)
class Run:
    """The training of one arm with one seed.

    Args:
        arm: The setting.
        directory: Where its checkpoints, costs and scores are kept.
        updates: Generator updates.
        seed: Seed of the run; determines all its random numbers.
        start_from: Checkpoint to start from.
        extra: Further arguments of ``fit``.
    """

    arm: Arm
    directory: Path
    updates: int
    seed: int
    start_from: Path | None = None
    extra: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """The last checkpoint."""
        return last_checkpoint(self.directory)

    @property
    def scorecard(self) -> Path:
        """The scores after ``updates``."""
        return self.directory / f"scores_{self.updates}.json"

    @property
    def cost(self) -> Path:
        """The training cost up to ``updates``, kept in case scoring is interrupted."""
        return self.directory / f"cost_{self.updates}.json"

    def row(self, task: Task, count: int) -> Row:
        """The scores of a finished run.

        Raises:
            UserError: If it was scored on other prompts.
        """
        (row,) = read_scorecard(self.scorecard, prompts=task.prompts, count=count).rows
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


def run_arm(run: Run, task: Task, count: int) -> None:
    """Train and score an arm; continue from what its directory already has.

    Raises:
        UserError: If the directory has a longer run, or scores on other prompts.
        StoppedBySignal: If a signal ended the training.
    """
    if run.scorecard.is_file():
        run.row(task, count)
        return
    before = _updates_of(run.checkpoint)
    if before > run.updates:
        trained = f"trained for {before} updates; {run.updates} requested"
        raise UserError(trained, where=str(run.checkpoint), remedy=ANOTHER_OUT)
    if not run.cost.is_file():
        write_atomically(run.cost, json.dumps(asdict(_train(run, before))) + "\n")
    cost = TrainingCost(**json.loads(run.cost.read_text(encoding="utf-8")))
    card = score([student(run.arm.name, load_module(str(run.checkpoint)))], task, count)
    write_scorecard(replace(card, rows=tuple(replace(row, training=cost) for row in card.rows)), run.scorecard)


def _updates_of(checkpoint: Path) -> int:
    """Generator updates that a checkpoint was trained for; 0 if there is none."""
    return (
        int(read_checkpoint(str(checkpoint), in_memory=False)["provenance"]["updates"]) if checkpoint.is_file() else 0
    )


def _train(run: Run, before: int) -> TrainingCost:
    """Continue the training from update ``before`` to the end."""
    settings: dict[str, Any] = {
        "trainer.max_steps": run.updates,
        "model.seed": run.seed,
        "data.seed": run.seed,
        "seed_everything": run.seed,
        **UNOBSERVED,
    }
    if run.start_from is not None:
        settings["model.start_from"] = str(run.start_from)
    if before:
        settings["ckpt_path"] = str(run.checkpoint)
    began = time.perf_counter()
    cli = train(run.directory, [*run.arm.arguments, *(option(*item) for item in settings.items()), *run.extra])
    seconds = time.perf_counter() - began
    updates = max(run.updates - before, 1)
    return TrainingCost(_evaluations(cli) / updates, seconds / updates)


def _evaluations(cli: DistillationCLI) -> int:
    """Network evaluations of a finished training."""
    return sum(cli.model.roles.evaluations.values())
