"""One directory per run: configuration, checkpoints, record, pictures, and the loggers' files where possible."""

from __future__ import annotations

import os
import re
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from gdmd_lightning.callbacks.write_warnings import tolerate_failed_writes
from gdmd_lightning.directories import DirectoryLock
from gdmd_lightning.errors import UserError, WriteError
from gdmd_lightning.files import write_atomically

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
RESULTS = (f"{CHECKPOINTS}/*.ckpt", "gradient_rewards/*", "pictures/*", "evaluations/*", "metrics.csv")
UNNAMED = "lightning_logs"


def run_directory(trainer: pl.Trainer) -> Path:
    """The directory of this run, which everything that writes files must ask for.

    A trainer without a :class:`RunDirectory` has Lightning's own; then all ranks must call this, since it is a
    broadcast.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, RunDirectory) and callback.path is not None:
            return callback.path
    return Path(trainer.log_dir or trainer.default_root_dir)


def starts_over(trainer: pl.Trainer) -> bool:
    """Whether this run starts over in its directory, where it was killed before its first checkpoint."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return any(isinstance(callback, RunDirectory) and callback.starts_over for callback in callbacks)


class RunDirectory(pl.Callback):
    """Decides the directory of a run before anything is written, and reserves it until the run ends.

    It is the directory of the first TensorBoard or CSV logger, ``<save_dir>/<name>/version_N``, or, without such a
    logger, a new directory of that form in the logger's ``save_dir`` or the trainer's ``default_root_dir``. A resumed
    run continues in the directory of its checkpoint.

    It must be the first callback. Rank 0 decides; the others follow in :meth:`setup`, also if it refuses.

    Attributes:
        path: The directory; None before the decision.
        starts_over: Whether the same run began in it before, and has no checkpoint.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.starts_over = False
        self._lock: DirectoryLock | None = None
        self._refusal: UserError | None = None

    def choose(
        self,
        trainer: pl.Trainer,
        resumed: Path | None,
        updates: int,
        *,
        placed: bool,
        configuration: str | None = None,
    ) -> None:
        """Decide, reserve the directory, and direct loggers and checkpoints to it; call before ``trainer.fit``.

        Args:
            trainer: The trainer.
            resumed: The checkpoint that the run continues, or None.
            updates: Updates of that checkpoint.
            placed: Whether the user asked for a place, so that a checkpoint elsewhere does not decide.
            configuration: The content of ``config.yaml``; a run that began with exactly this one, and was killed before
                its first checkpoint, is started over. None to refuse that, too.

        Raises:
            UserError: If the directory is in use, or has results of another run. If other ranks run already, they and
                this one raise it in :meth:`setup`.
            WriteError: If the directory cannot be written to; raised likewise.
        """
        if not trainer.is_global_zero:
            return
        try:
            self._decide(trainer, resumed, updates, placed, configuration)
        except UserError as error:
            if not _others_run(trainer):
                raise
            # The others wait for this rank, and nothing can be sent to them before they have met.
            self._refusal = error
            trainer.loggers = []  # Lightning lets them write before it calls setup

    def _decide(
        self, trainer: pl.Trainer, resumed: Path | None, updates: int, placed: bool, configuration: str | None
    ) -> None:
        logger, root = versioned(trainer.loggers), run_root(trainer)
        own = None if resumed is None else _run_of(resumed)
        if logger is not None and logger._version is not None:
            path = root / version_name(logger._version)
        elif own is not None and (not placed or own.parent.resolve() == root.resolve()):
            path = own
        else:
            path = _new_version(root)
        self._lock = DirectoryLock(path)
        began = resumed is None and configuration is not None and _began(path, configuration)
        self.starts_over = began and not _has_checkpoint(trainer, path)
        if resumed is None and not self.starts_over and any(True for pattern in RESULTS for _ in path.glob(pattern)):
            self.release()
            last = path / CHECKPOINTS / "last.ckpt"
            there = (
                f"continue that run with --ckpt_path {last}" if last.exists() else "remove it, as it has no last.ckpt"
            )
            raise UserError("it has results of another run", where=str(path), remedy=f"{there}, or use another version")
        self.path = path
        if self.starts_over:
            updates = -1  # something may have been logged at 0, before the first update
        _direct(trainer, path, root, updates if self.starts_over or resumed is not None else None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Tell all ranks what rank 0 decided.

        Raises:
            UserError: On all ranks, if it refused.
        """
        mine = (self._refusal, None if self.path is None else str(self.path), self.starts_over)
        refusal, decided, self.starts_over = trainer.strategy.broadcast(mine)
        if refusal is not None:
            raise refusal
        self.path = None if decided is None else Path(decided)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop the rows that a resumed run logged after its checkpoint, which has been accepted by now."""
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger) and isinstance(logger._experiment, _ContinuedMetrics):
                logger._experiment.begin()

    def release(self) -> None:
        """Give the directory back; one that is still empty is removed."""
        if self._lock is not None:
            self._lock.release()


def _others_run(trainer: pl.Trainer) -> bool:
    """Whether a launcher has started other ranks; on a single node ``trainer.fit`` may start them itself, later."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if environment is None or trainer.world_size == 1:
        return False
    return trainer.num_nodes > 1 or environment.creates_processes_externally


def run_root(trainer: pl.Trainer) -> Path:
    """The directory of a trainer's runs, each of which is a ``version_N``.

    Raises:
        UserError: If no logger and not the trainer has a local directory.
    """
    logger = versioned(trainer.loggers)
    if logger is not None:
        return _expanded(logger.root_dir)
    first = trainer.loggers[0] if trainer.loggers else None
    save_dir = str((first and first.save_dir) or trainer.default_root_dir)
    if not _is_local(save_dir):
        save_dir = trainer.default_root_dir
    if not _is_local(save_dir):
        raise UserError(
            f"{save_dir!r} is not a local directory", where="trainer.default_root_dir", remedy="give a local one"
        )
    return _expanded(save_dir) / str((first and first.name) or UNNAMED)


def _expanded(place: str) -> Path:
    """A path with ``~`` and variables of the environment replaced; of Lightning's loggers only TensorBoard's does."""
    return Path(os.path.expandvars(os.path.expanduser(place)))


def versioned(loggers: list[Logger]) -> TensorBoardLogger | CSVLogger | None:
    """The first logger that has a local directory of its own for each run."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger | CSVLogger) and _is_local(logger.root_dir):
            return logger
    return None


def _is_local(place: str) -> bool:
    return "://" not in place


def version_name(version: int | str) -> str:
    """The name that Lightning's loggers give to a version's directory."""
    return version if isinstance(version, str) else f"version_{version}"


def _run_of(checkpoint: Path) -> Path | None:
    """The run that a checkpoint is of, if it still lies where the run saved it."""
    return checkpoint.parent.parent if checkpoint.parent.name == CHECKPOINTS else None


def _began(path: Path, configuration: str) -> bool:
    """Whether a run of this very configuration began in a directory."""
    file = path / CONFIG
    return file.is_file() and file.read_text(encoding="utf-8") == configuration


def _has_checkpoint(trainer: pl.Trainer, path: Path) -> bool:
    keepers = [keeper for keeper in trainer.checkpoint_callbacks if isinstance(keeper, ModelCheckpoint)]
    places = [path / CHECKPOINTS, *(Path(keeper.dirpath) for keeper in keepers if keeper.dirpath is not None)]
    return any(True for place in places for _ in place.glob("*.ckpt"))


def _new_version(root: Path) -> Path:
    """Create ``version_N`` with the next number, which no other process gets."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        taken = [int(found[1]) for p in root.iterdir() if (found := re.fullmatch(r"version_(\d+)", p.name))]
        number = max(taken, default=-1) + 1
        while True:
            path = root / f"version_{number}"
            try:
                path.mkdir()
                return path
            except FileExistsError:
                number += 1
    except OSError as error:
        reason = f"cannot be written: {error.strerror}"
        remedy = "give another place with trainer.logger.init_args.save_dir or trainer.default_root_dir"
        raise WriteError(reason, where=str(root), remedy=remedy) from error


def _direct(trainer: pl.Trainer, path: Path, root: Path, updates: int | None) -> None:
    """Make loggers and checkpoint callbacks that have no other place write to the run's directory.

    Args:
        trainer: The trainer.
        path: The run's directory.
        root: Where the trainer's runs are.
        updates: Updates of the checkpoint that is resumed; what was logged later is dropped. None in a new directory.
    """
    for logger in trainer.loggers:
        tolerate_failed_writes(logger)
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or not _is_local(logger.root_dir):
            continue
        if isinstance(logger, CSVLogger):
            logger._save_dir = str(_expanded(logger.save_dir))
        else:  # it would make the directory under the name as given, too
            logger._root_dir = str(_expanded(logger._root_dir))
        if logger._version is None and _expanded(logger.root_dir).resolve() == root.resolve():
            # Loggers decide their place when they are constructed, which is before the checkpoint is known.
            logger._root_dir, logger._name, logger._version = str(path.parent), "", path.name
            if isinstance(logger, CSVLogger):
                logger._save_dir = str(path.parent)
        if isinstance(logger, CSVLogger):
            if updates is not None:
                logger._experiment = _ContinuedMetrics(logger.log_dir, updates)
            elif Path(logger.log_dir).resolve() == path.resolve():
                # Lightning's would warn that it deletes what other callbacks have written there.
                logger._experiment = new = _ContinuedMetrics(logger.log_dir, -1)
                new.begin()
        elif updates is not None and logger._kwargs.get("purge_step") is None:
            # Not "in": the command line gives a class all of its arguments.
            logger._kwargs["purge_step"] = updates + 1
    for keeper in trainer.checkpoint_callbacks:
        if isinstance(keeper, ModelCheckpoint) and keeper.dirpath is None:
            keeper.dirpath = str((path / CHECKPOINTS).absolute())


class _ContinuedMetrics(ExperimentWriter):
    """Continues the files of a run, and leaves them as they are until :meth:`begin`; Lightning's deletes them.

    Args:
        log_dir: The logger's directory.
        updates: Updates of the checkpoint that is resumed; -1 for none.
    """

    def __init__(self, log_dir: str, updates: int) -> None:
        super().__init__(log_dir)
        self._updates = updates
        self._begun = False

    def begin(self) -> None:
        """Drop all rows after the checkpoint, the first time; a refused checkpoint must not cost a run its rows."""
        if self._begun:
            return
        self._begun = True
        file = Path(self.metrics_file_path)
        if not file.is_file():
            return
        import csv
        import io

        with file.open(newline="", encoding="utf-8") as text:
            reader = csv.DictReader(text)
            rows = [row for row in reader if float(row.get("step") or 0) <= self._updates]
            self.metrics_keys = list(reader.fieldnames or [])
        kept = io.StringIO(newline="")
        writer = csv.DictWriter(kept, self.metrics_keys)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(file, kept.getvalue())

    def save(self) -> None:
        """Write what was logged, and no empty ``hparams.yaml`` before training starts."""
        if self._begun:
            super().save()

    def _check_log_dir_exists(self) -> None:
        """Delete nothing."""
