"""Scores by task: GenEval and mean rewards, averaged over tasks, with confidence intervals."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gdmd_lightning.described import Described, arguments_digest, described
from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.metadata import check_metadata
from gdmd_lightning.metrics.intervals import NO_TASK, Interval, Value, exact_mean, intervals
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward, checked_score
from gdmd_lightning.rewards.geneval import GenEvalReward
from gdmd_lightning.shapes.detector import ShapesDetector

STATES = {
    "values": torch.float32,
    "tasks": torch.long,
    "parts": torch.float32,
    "part_numbers": torch.long,
    "part_counts": torch.long,
}
"""What a score keeps: values and task of each picture, value and name of each part, parts of each picture."""


class TaskScore(Metric, Described):
    """One value per picture, averaged within each task and then over the tasks, as GenEval does.

    A value may have named parts, such as the answers to a prompt's questions; the mean of each name is reported too.

    Source: djghosh13/geneval, ``summary_scores``.
    """

    full_state_update = False
    name: str = "score"

    values: list[Tensor]
    tasks: list[Tensor]
    parts: list[Tensor]
    part_numbers: list[Tensor]
    part_counts: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task_names: list[str] = []
        self.names_of_parts: list[str] = []
        for state in STATES:
            self.add_state(state, default=[], dist_reduce_fx="cat")

    @abstractmethod
    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One value per picture, ``[B]``."""

    def part_names(self, prompt: Prompt) -> Sequence[str]:
        """Names of the parts of a picture's value; by default there are none."""
        return ()

    def judge_parts(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, list[Tensor]]:
        """One value per picture, ``[B]``, and its parts, ``[n]`` for each picture of ``n`` names."""
        return self.judge(images, prompts), [torch.zeros(0)] * len(prompts)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that the prompts contain what the score needs.

        Raises:
            UserError: If a prompt lacks it.
        """

    def prepare(self) -> None:
        """Load what the score needs; called before training, so that nothing is missing later.

        Raises:
            UserError: If something is missing or broken.
        """

    def place(self, device: torch.device) -> None:
        """Move the score's networks, if it has any, to the device of the pictures, or back to the CPU."""

    def sketch(self) -> nn.Module | None:
        """The score's networks on the meta device, for memory planning; ``None`` if it has none."""
        return None

    def settings(self) -> Any:
        """What the score computes, as plain values: two scores with other settings must not be compared.

        Arguments of the constructor of a subclass enter as a digest; what else decides a value belongs here.
        """
        found = {"class": type(self).__qualname__, "name": self.name}
        arguments = arguments_digest(self)
        return found if arguments is None else {**found, "arguments": arguments}

    def figures(self, prompts: Sequence[Prompt]) -> list[str]:
        """Names of what :meth:`compute` gives for a test set."""
        tasks, parts = _tasks_and_parts(self, prompts)
        return ["overall", *(tasks if tasks != [NO_TASK] else []), *parts]

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Drop all values and number the tasks of the whole test set, so that ranks agree on the numbers.

        Raises:
            UserError: If there is no prompt, or one lacks what the score needs.
        """
        if not prompts:
            raise UserError("there are no prompts", where=f"score {self.name!r}")
        self.check(prompts)
        self.reset()
        # A rank without prompts has values too, if none: ranks would otherwise not gather the same number of tensors.
        for state, dtype in STATES.items():
            getattr(self, state).append(torch.zeros(0, dtype=dtype, device=self.device))
        self.task_names, self.names_of_parts = _tasks_and_parts(self, prompts)

    @torch.no_grad()
    def values_of(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Value]:
        """Judge pictures ``[B, 3, H, W]`` in [0, 1]; their values are not added."""
        # A copy: a reward may change its input in place, and others judge the same pictures.
        values, parts = self.judge_parts(images.clone(), prompts)
        each = zip(values.float().tolist(), parts, strict=True)
        return [Value(value, tuple(mine.float().tolist())) for value, mine in each]

    def update(self, judged: Tensor | Sequence[Value], prompts: Sequence[Prompt]) -> None:
        """Judge pictures ``[B, 3, H, W]`` in [0, 1] and add their values, or add values of pictures judged before."""
        values = self.values_of(judged, prompts) if isinstance(judged, Tensor) else judged
        names = [self.part_names(prompt) for prompt in prompts]
        added: dict[str, list[Any]] = {
            "values": [each.value for each in values],
            "tasks": [self.task_names.index(task_of(prompt)) for prompt in prompts],
            "parts": [part for each in values for part in each.parts],
            "part_numbers": [self.names_of_parts.index(name) for each in names for name in each],
            "part_counts": [len(each) for each in names],
        }
        for state, dtype in STATES.items():
            getattr(self, state).append(torch.tensor(added[state], dtype=dtype, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """``overall``, if the prompts have tasks their means, and the means of parts; in float64 on the CPU."""
        values, tasks = dim_zero_cat(self.values), dim_zero_cat(self.tasks)
        means = {name: exact_mean(values[tasks == i]) for i, name in enumerate(self.task_names)}
        out = {"overall": exact_mean(torch.stack(list(means.values())))}
        if self.task_names != [NO_TASK]:
            out |= means
        parts, numbers = dim_zero_cat(self.parts), dim_zero_cat(self.part_numbers)
        return out | {name: exact_mean(parts[numbers == i]) for i, name in enumerate(self.names_of_parts)}

    def intervals(self) -> dict[str, Interval]:
        """Like ``compute``, with 95% bootstrap intervals: pictures are resampled, within their tasks."""
        values, tasks, parts, numbers, counts = (dim_zero_cat(getattr(self, state)).cpu() for state in STATES)
        of_pictures = [tuple(mine.tolist()) for mine in parts.split(counts.tolist())]
        names = [[self.names_of_parts[i] for i in mine.tolist()] for mine in numbers.split(counts.tolist())]
        found = [Value(value, mine) for value, mine in zip(values.tolist(), of_pictures, strict=True)]
        return intervals(found, [self.task_names[i] for i in tasks.tolist()], names, range(len(found)))


def _tasks_and_parts(score: TaskScore, prompts: Sequence[Prompt]) -> tuple[list[str], list[str]]:
    """Tasks, and names of parts, of a test set, in the order of its prompts."""
    tasks = dict.fromkeys(task_of(prompt) for prompt in prompts)
    return list(tasks), list(dict.fromkeys(name for prompt in prompts for name in score.part_names(prompt)))


def task_of(prompt: Prompt) -> str:
    """The prompt's GenEval task, or ``all`` if it has none."""
    return str(prompt.metadata.get("tag", NO_TASK))


class RewardScore(TaskScore):
    """Mean reward; the score has the reward's name.

    Args:
        reward: Any reward.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward
        self.name = reward.name

    def settings(self) -> Any:
        return {"class": type(self).__qualname__, "name": self.name, "reward": described(self.reward)}

    def check(self, prompts: Sequence[Prompt]) -> None:
        self.reward.check(prompts)

    def prepare(self) -> None:
        self.reward.prepare()

    def place(self, device: torch.device) -> None:
        self.reward.to(device)

    def sketch(self) -> nn.Module | None:
        return self.reward.sketch()

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return checked_score(self.reward, images, prompts)


class GenEvalScore(RewardScore):
    """Share of pictures that are correct under GenEval's rules.

    Args:
        detector: Finds the objects; by default the detector of the Shapes world.
        name: Name in logs.
    """

    def __init__(self, detector: Detector | None = None, name: str = "geneval") -> None:
        detector = detector or ShapesDetector()
        super().__init__(GenEvalReward(detector, name=name))
        self.detector = detector

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_metadata(prompts, f"score {self.name!r}", classes=self.detector.classes, colors=self.detector.colors)
