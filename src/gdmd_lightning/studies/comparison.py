"""A comparison of methods: from one start per seed, to one budget of network evaluations, scored on the way."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.files import make_directory, write_atomically
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.ranges import Count, Seed, ranged
from gdmd_lightning.studies.arms import SECTIONS, Arm, Run, run_arm
from gdmd_lightning.studies.contestants import draw, student, teachers
from gdmd_lightning.studies.outcome import Outcome
from gdmd_lightning.studies.page import write_page
from gdmd_lightning.studies.recorded import ANOTHER_OUT, check_recorded, settings_of
from gdmd_lightning.studies.scorecards import Row, read_scorecard, score, write_scorecard
from gdmd_lightning.studies.tables import comparison_table
from gdmd_lightning.studies.tasks import TASKS, Task
from gdmd_lightning.studies.watch import Watch


@ranged
@dataclass(frozen=True)
class Start:
    """What all methods start from.

    Args:
        arm: Its training.
        evaluations: Network evaluations of it.
    """

    arm: Arm
    evaluations: Count


@ranged
@dataclass(frozen=True)
class Comparison:
    """Settings of ``compare``.

    Every seed trains one start, and every method continues from it until it has spent ``evaluations`` network
    evaluations. So methods are compared at equal cost, and differences between them are paired by seed. The directory
    may be filled by several processes, with different seeds each, and a stopped comparison continues.

    Args:
        methods: The methods by their names in tables.
        start: What they start from.
        evaluations: Network evaluations of each method after the start.
        points: How often each method is scored: after equal parts of its evaluations.
        seeds: Seeds of the starts; a method's own seed is 1000 larger.
        control: The method that all others are compared with, besides the teacher.
        task: What the methods are scored on; ``shapes``.
        count: Test prompts.
        watch: Prompts and samples for the figures that no method is trained on.
        out: Directory of runs, scores, table and page.
        processes: Seeds that train at the same time, each on one thread if there are several.
        fit: Further arguments of all trainings, such as ``--trainer.accelerator=gpu``.
    """

    methods: dict[str, Arm]
    start: Start
    evaluations: Count
    points: Count = 4
    seeds: list[Seed] = field(default_factory=lambda: [0, 1, 2])
    control: str = "DMD"
    task: str = "shapes"
    count: Count = 1200
    watch: Watch = Watch()
    out: Path = Path("runs/compare")
    processes: Count = 1
    fit: list[str] = field(default_factory=list)

    @property
    def scored_on(self) -> Task:
        """The task."""
        return TASKS[self.task]

    @property
    def budgets(self) -> list[int]:
        """Network evaluations at which each method is scored."""
        return [self.evaluations * i // self.points for i in range(1, self.points + 1)]

    def start_of(self, seed: int) -> Run:
        """The start of a seed."""
        return Run("start", self.start.arm, self._directory("start", seed), seed, extra=tuple(self.fit))

    def run_of(self, method: str, seed: int) -> Run:
        """A method's run with a seed."""
        directory, start = self._directory(method, seed), self.start_of(seed).checkpoint
        return Run(method, self.methods[method], directory, seed + 1000, start, tuple(self.fit))

    def _directory(self, name: str, seed: int) -> Path:
        slug = "".join(c if c.isalnum() else "_" for c in name.lower())
        return self.out / f"seed{seed}" / slug

    def check(self) -> None:
        """Fail before any training if a setting is wrong or the directory belongs to another comparison.

        Raises:
            UserError: If it does; the message names the setting or file.
        """
        _check_settings(self)
        self.start.arm.check("start", self.fit, self.scored_on)
        directories = {"start"}
        for name, arm in self.methods.items():
            place = self._directory(name, 0).name
            if place in directories:
                raise UserError(f"{name!r} has the directory of another one", where="methods", remedy="rename it")
            directories.add(place)
            arm.check(name, self.fit, self.scored_on)
        self.scored_on.read_prompts(self.count)
        make_directory(self.out)
        self._check_recorded()
        for seed in self.seeds:
            start = self.start_of(seed)
            if any(path != start.scorecard(self.start.evaluations) for path in start.directory.glob("scores_*.json")):
                other = f"methods in {self.out} start from a start of another length"
                raise UserError(other, where="start.evaluations", remedy=ANOTHER_OUT)
        for path in sorted([*self.out.glob("seed*/*/scores_*.json"), *self.out.glob("teacher.json")]):
            read_scorecard(path, prompts=self.scored_on.prompts, count=self.count)

    def _check_recorded(self) -> None:
        """Fail if a run of any seed in the directory was trained or scored with other settings."""
        seed = self.seeds[0]
        for run in (self.start_of(seed), *(self.run_of(name, seed) for name in self.methods)):
            pattern = settings_of(Path("seed*") / run.directory.name)
            places = sorted(path.parent for path in self.out.glob(str(pattern)))
            if begun := [place for place in places if replace(run, directory=place).has_begun]:
                settings = run.settings(self.watch)
                for place in begun:
                    check_recorded(place, settings, SECTIONS, where=run.name, out=self.out)

    def train_and_score(self) -> Iterator[str]:
        """Train and score what is missing; yields a line after each run."""
        if self.processes == 1 or len(self.seeds) == 1:
            for seed in self.seeds:
                yield from self._seed(seed)
            return
        # Fresh processes: torch's threads do not survive a fork.
        context = multiprocessing.get_context("spawn")
        others = multiprocessing.active_children()
        waiting, running = list(self.seeds), set[Future[list[str]]]()
        with ProcessPoolExecutor(self.processes, context, torch.set_num_threads, (1,)) as pool:
            try:
                while waiting or running:
                    # No more than train at once: what a pool has been given beyond that starts even after a stop.
                    while waiting and len(running) < self.processes:
                        running.add(pool.submit(self._whole_seed, waiting.pop(0)))
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for each in done:
                        yield from each.result()
            except KeyboardInterrupt:
                for process in multiprocessing.active_children():
                    if process not in others:
                        process.terminate()  # a training saves where it is
                raise

    def _whole_seed(self, seed: int) -> list[str]:
        return list(self._seed(seed))

    def _seed(self, seed: int) -> Iterator[str]:
        run_arm(self.start_of(seed), [self.start.evaluations], self.scored_on, self.count, self.watch)
        for name in self.methods:
            run_arm(self.run_of(name, seed), self.budgets, self.scored_on, self.count, self.watch)
            yield f"seed {seed}, {name}: done"

    def outcome(self) -> Outcome:
        """The scores of a finished comparison."""
        task = self.scored_on
        return Outcome(
            task,
            self.control,
            tuple(self.seeds),
            self._teacher(),
            tuple(self.start_of(seed).row(self.start.evaluations, task, self.count) for seed in self.seeds),
            {
                name: tuple(
                    tuple(self.run_of(name, seed).row(budget, task, self.count) for budget in self.budgets)
                    for seed in self.seeds
                )
                for name in self.methods
            },
        )

    def _teacher(self) -> tuple[Row, ...]:
        path = self.out / "teacher.json"
        if not path.is_file():
            card = score(teachers(self._start()), self.scored_on, self.count, watch=self.watch)
            write_scorecard(card, path)
        return read_scorecard(path, prompts=self.scored_on.prompts, count=self.count).rows

    def _start(self) -> DistillationModule:
        return self.start_of(self.seeds[0]).module()

    def report(self) -> str:
        """The Markdown table of a finished comparison.

        It is also written to ``results.md``, with all scores in ``scores.json``, pictures of the first seed, and a page
        that shows everything.
        """
        outcome = self.outcome()
        text = comparison_table(outcome)
        write_atomically(self.out / "results.md", text + "\n")
        write_atomically(self.out / "scores.json", json.dumps(outcome.entries(), indent=1) + "\n")
        seed = self.seeds[0]
        checkpoints = {"start": self.start_of(seed), **{name: self.run_of(name, seed) for name in self.methods}}
        contestants = teachers(self._start())[:1]
        contestants += [student(name, run.module()) for name, run in checkpoints.items()]
        draw(contestants, self.scored_on.read_prompts(self.count), self.out / "pictures.png")
        settings = json.loads(json.dumps(asdict(self), default=str))
        write_page(self.out / "index.html", outcome, settings, self.out / "pictures.png")
        return text


def _check_settings(settings: Comparison) -> None:
    if settings.points > settings.evaluations:
        raise UserError(f"it is {settings.points}", where="points", remedy="use at most one per evaluation")
    if not settings.seeds or len(set(settings.seeds)) < len(settings.seeds):
        raise UserError(f"they are {settings.seeds}", where="seeds", remedy="give each seed once, at least one")
    if not settings.methods:
        raise UserError("there are none", where="methods", remedy="name at least one, with its configs")
    if settings.control not in settings.methods:
        known = ", ".join(settings.methods)
        raise UserError(f"{settings.control!r} is not a method", where="control", remedy=f"use one of: {known}")
    if settings.task not in TASKS:
        raise UserError(f"unknown task {settings.task!r}", where="task", remedy=f"use one of: {', '.join(TASKS)}")
