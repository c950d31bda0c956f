"""Which checkpoint ``--ckpt_path`` means, and whether the user also said where the run should be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from gdmd_lightning.callbacks.run_directory import CHECKPOINTS, run_root, version_name, versioned
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import shipped_configs
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.strategies.shards import is_sharded

NAMED = ("last", "best", "last_or_new")
PLACES = ("trainer.logger", "trainer.default_root_dir")


def resolve_checkpoint(given: str, trainer: Trainer) -> Path | None:
    """The file that ``--ckpt_path`` means; None to start a new run.

    Args:
        given: A path; ``last`` for the last checkpoint of the newest run in the trainer's place; ``best`` for the
            best one of that run; ``last_or_new`` for the last checkpoint of the version that the logger is given,
            or a new run if it has none.
        trainer: The trainer, before anything is directed to the new run's directory.

    Raises:
        UserError: If there is no such checkpoint, or if ``best`` or ``last_or_new`` has no meaning.
    """
    if given not in NAMED:
        return Path(given)
    keepers = [k for k in trainer.checkpoint_callbacks if isinstance(k, ModelCheckpoint)]
    if given == "best" and all(keeper.monitor is None for keeper in keepers):
        remedy = "add a ModelCheckpoint with monitor, or give the path of a .ckpt file"
        raise UserError(
            "no ModelCheckpoint monitors a score, so no checkpoint is best", where="ckpt_path", remedy=remedy
        )
    found = [path for path in _last_checkpoints(trainer, keepers) if path.is_file() or is_sharded(path)]
    if given == "last_or_new":
        _check_version(trainer)
        if not found:
            return None
    if not found:
        place = _place(trainer)
        raise UserError(f"no run in {str(place)!r} has a last.ckpt", where=f"ckpt_path {given}", remedy=_REMEDY)
    newest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return _best(newest) if given == "best" else newest


_REMEDY = "give the path of a .ckpt file, or leave ckpt_path out to start a new run"


def _check_version(trainer: Trainer) -> None:
    """Refuse to guess which of several runs a new process continues."""
    logger = versioned(trainer.loggers)
    if logger is None or logger._version is None:
        raise UserError(
            "it continues one run, in a directory that is known before it starts",
            where="ckpt_path last_or_new",
            remedy="use a TensorBoardLogger or CSVLogger with a version, such as --trainer.logger.version first",
        )


def _place(trainer: Trainer) -> Path:
    """The directory in which ``last`` looks: that of the runs, or of the one version that the user gave."""
    logger, root = versioned(trainer.loggers), run_root(trainer)
    if logger is None or logger._version is None:
        return root
    return root / version_name(logger._version)


def _last_checkpoints(trainer: Trainer, keepers: list[ModelCheckpoint]) -> Iterator[Path]:
    place = _place(trainer)
    for name in ("last.ckpt", "interrupted.ckpt"):
        yield place / CHECKPOINTS / name
        yield from place.glob(f"version_*/{CHECKPOINTS}/{name}")
    for keeper in keepers:
        if keeper.dirpath is not None:
            yield Path(keeper.dirpath) / "last.ckpt"


def _best(last: Path) -> Path:
    """The best checkpoint that a run's last one knows of."""
    states = read_checkpoint(str(last), in_memory=False).get("callbacks", {}).values()
    for state in states:
        if isinstance(state, dict) and state.get("monitor") is not None and state.get("best_model_path"):
            known = Path(state["best_model_path"])
            for path in (known, last.parent / known.name):  # the run may have been moved
                if path.is_file() or is_sharded(path):
                    return path
    raise UserError("that run has no best checkpoint", where=f"ckpt_path best, {last}", remedy=_REMEDY)


def place_given(arguments: Sequence[str]) -> bool:
    """Whether arguments of ``fit``, or a configuration that is not a shipped one, say where a run should be."""
    previous = ""
    for argument in arguments:
        if argument.startswith(tuple(f"--{key}" for key in PLACES)):
            return True
        path = argument if previous in ("--config", "-c") else argument.removeprefix("--config=")
        if (previous in ("--config", "-c") or path != argument) and not _is_shipped(path):
            trainer: Any = (yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}).get("trainer") or {}
            if any(key.removeprefix("trainer.") in trainer for key in PLACES):
                return True
        previous = argument
    return False


def _is_shipped(path: str) -> bool:
    return shipped_configs().resolve() in Path(path).resolve().parents
