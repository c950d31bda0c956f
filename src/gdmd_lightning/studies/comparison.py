"""A comparison of arms over seeds: with one seed, every arm starts from the same DMD cold start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import write_atomically
from gdmd_lightning.studies.arms import ANOTHER_OUT, ARMS, DMD, Arm, Run, run_arm
from gdmd_lightning.studies.contestants import teachers
from gdmd_lightning.studies.scorecards import read_scorecard, score, write_scorecard
from gdmd_lightning.studies.tables import comparison_table
from gdmd_lightning.studies.tasks import Task


@dataclass(frozen=True)
class Comparison:
    """Arms compared over seeds, in one directory that several processes may fill.

    Args:
        task: What the arms are scored on.
        out: Directory of runs, scores and the table.
        seeds: Seeds of the cold starts; an arm's own seed is 1000 larger.
        arms: The arms by name.
        cold_start: DMD updates that all arms start from.
        updates: Updates of each arm after the cold start.
        count: Test prompts.
        extra: Further arguments of all trainings.
    """

    task: Task
    out: Path
    seeds: tuple[int, ...]
    arms: Mapping[str, Arm]
    cold_start: int
    updates: int
    count: int
    extra: tuple[str, ...] = ()

    def start(self, seed: int) -> Run:
        """The cold start of a seed."""
        return Run(DMD, self._directory("cold start", seed), self.cold_start, seed, extra=self.extra)

    def run(self, arm: Arm, seed: int) -> Run:
        """An arm's run with a seed."""
        start = self.start(seed).checkpoint
        return Run(arm, self._directory(arm.name, seed), self.updates, seed + 1000, start, self.extra)

    def _directory(self, name: str, seed: int) -> Path:
        slug = "".join(c if c.isalnum() else "_" for c in name.lower())
        return self.out / f"seed{seed}" / slug

    def check(self) -> None:
        """Fail before any training if the directory has results of another comparison.

        Raises:
            UserError: If the number of prompts is impossible, or the directory has a cold start of another length
                or scores on other prompts.
        """
        self.task.read_prompts(self.count)
        for seed in self.seeds:
            start = self.start(seed)
            if any(path != start.scorecard for path in start.directory.glob("scores_*.json")):
                other = f"arms in {self.out} start from a cold start of another length"
                raise UserError(other, where="--cold_start", remedy=ANOTHER_OUT)
        for path in sorted([*self.out.glob("seed*/*/scores_*.json"), *self.out.glob("teacher.json")]):
            read_scorecard(path, prompts=self.task.prompts, count=self.count)

    def train_and_score(self) -> Iterator[str]:
        """Train and score what is missing; yields a line after each arm."""
        for seed in self.seeds:
            run_arm(self.start(seed), self.task, self.count)
            for arm in self.arms.values():
                run_arm(self.run(arm, seed), self.task, self.count)
                yield f"seed {seed}, {arm.name}: done"

    def report(self) -> str:
        """The Markdown table of a finished comparison; also written to ``results.md``."""
        path = self.out / "teacher.json"
        if not path.is_file():
            module = load_module(str(self.start(self.seeds[0]).checkpoint))
            write_scorecard(score(teachers(module), self.task, self.count), path)
        teacher = read_scorecard(path, prompts=self.task.prompts, count=self.count)
        starts = [self.start(seed).row(self.task, self.count) for seed in self.seeds]
        arms = {
            name: [self.run(arm, seed).row(self.task, self.count) for seed in self.seeds]
            for name, arm in self.arms.items()
        }
        cold_start = {f"cold start: {DMD.name}, {self.cold_start} updates": starts}
        text = comparison_table(self.task, teacher.rows, cold_start, arms)
        write_atomically(self.out / "results.md", text + "\n")
        return text


def named_arms(names: list[str]) -> dict[str, Arm]:
    """The registered arms of these names.

    Raises:
        UserError: If a name is unknown.
    """
    for name in names:
        if name not in ARMS:
            raise UserError(f"unknown arm {name!r}", where="--arms", remedy=f"use: {'; '.join(ARMS)}")
    return {name: ARMS[name] for name in names}
