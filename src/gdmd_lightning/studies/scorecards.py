"""Scores of generators with their intervals, and the one JSON form in which all commands write and read them.

A scorecard records the prompts that it was scored on, so that scores on different prompts are never compared.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from gdmd_lightning.errors import UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.metrics.evaluation import evaluate
from gdmd_lightning.metrics.intervals import Interval
from gdmd_lightning.studies.contestants import Contestant
from gdmd_lightning.studies.tasks import Task
from gdmd_lightning.studies.watch import Watch


@dataclass(frozen=True)
class TrainingCost:
    """What a training cost up to where it was scored.

    Args:
        updates: Generator updates.
        evaluations: Network evaluations of single latents.
        seconds: Seconds of training, over all its stops; None if it was stopped under an earlier version, which did not
            keep them.
    """

    updates: int
    evaluations: int
    seconds: float | None


@dataclass(frozen=True)
class Row:
    """One generator's scores.

    Args:
        name: The generator's name.
        evaluations: Network evaluations per picture.
        seconds: Seconds per picture.
        scores: Mean and 95% interval by ``<score>/<task>``.
        watched: What no method is trained on, by name: mean and 95% interval, see :class:`Watch`.
        training: Cost of its training, where the study trained it.
    """

    name: str
    evaluations: int
    seconds: float
    scores: dict[str, Interval] = field(default_factory=dict)
    watched: dict[str, Interval] = field(default_factory=dict)
    training: TrainingCost | None = None


@dataclass(frozen=True)
class Scorecard:
    """Scores on one set of test prompts.

    Args:
        prompts: Source of the prompts.
        count: Number of prompts.
        rows: One row per generator, all from the same noise.
    """

    prompts: str
    count: int
    rows: tuple[Row, ...]


def score(
    contestants: Sequence[Contestant],
    task: Task,
    count: int,
    seed: int = 0,
    device: str = "cpu",
    watch: Watch | None = None,
) -> Scorecard:
    """Score every contestant on the first ``count`` prompts of the task, from the same noise.

    Args:
        contestants: The generators.
        task: Prompts and scores.
        count: Number of prompts.
        seed: Seed of the noise.
        device: Where the contestants are.
        watch: What to measure besides.
    """
    prompts, scores, rows = task.read_prompts(count), task.scores(), []
    for contestant in tqdm(contestants, desc="scoring", unit="generator"):
        place = torch.device(device)
        seconds = evaluate(contestant.generate, prompts, scores, contestant.latent_shape, seed=seed, device=place)
        found = {f"{s.name}/{name}": interval for s in scores for name, interval in s.intervals().items()}
        figures = {} if watch is None else watch(contestant)
        rows.append(Row(contestant.name, contestant.evaluations, seconds, found, figures))
    return Scorecard(task.prompts, count, tuple(rows))


def write_scores(rows: Sequence[Any], path: Path) -> None:
    """Write rows of scores, dataclasses, as a JSON list, complete or not at all."""
    write_atomically(path, json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def write_scorecard(card: Scorecard, path: Path) -> None:
    """Write a scorecard as JSON, complete or not at all."""
    write_atomically(path, json.dumps(asdict(card), indent=1) + "\n")


def read_scorecard(path: Path, *, prompts: str, count: int) -> Scorecard:
    """Read a scorecard that is to be compared with scores on ``count`` prompts of the source ``prompts``.

    Raises:
        UserError: If the file is not a scorecard, or was scored on other prompts.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        card = Scorecard(content["prompts"], content["count"], tuple(_row(row) for row in content["rows"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"not a readable scorecard: {type(error).__name__}: {error}"
        raise UserError(reason, where=str(path), remedy="remove it, or use another --out") from error
    for name, there, here in (("prompts", card.prompts, prompts), ("count", card.count, count)):
        if there != here:
            raise UserError(
                f"scored with {name} {there}; {name} {here} requested",
                where=str(path),
                remedy=f"use another --out, or {name} {there}",
            )
    return card


def _row(content: dict[str, Any]) -> Row:
    intervals = {
        part: {name: Interval(**interval) for name, interval in content[part].items()} for part in ("scores", "watched")
    }
    cost = content["training"]
    return Row(**{**content, **intervals, "training": None if cost is None else TrainingCost(**cost)})
