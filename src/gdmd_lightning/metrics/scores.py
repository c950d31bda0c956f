"""Scores by task: GenEval's verdict and any reward, each a mean of the tasks' means with an interval."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward, checked_score

NO_TASK = "all"


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95% interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


class TaskScore(Metric):
    """A value a picture, averaged within each task and then over the tasks, as GenEval does.

    Source: djghosh13/geneval, ``summary_scores``.
    """

    full_state_update = False
    name: str = "score"

    values: list[Tensor]
    tasks: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task_names: list[str] = []
        self.add_state("values", default=[], dist_reduce_fx="cat")
        self.add_state("tasks", default=[], dist_reduce_fx="cat")

    @abstractmethod
    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """One value a picture, ``[B]``."""

    def begin(self, prompts: Sequence[Prompt]) -> None:
        """Forget all values; number the tasks of the whole test set, the same on every rank."""
        self.reset()
        self.task_names = list(dict.fromkeys(task_of(prompt) for prompt in prompts))

    def update(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Add pictures ``[B, 3, H, W]`` in [0, 1]."""
        self.values.append(self.judge(images, prompts).to(self.device, torch.float32))
        self.tasks.append(torch.tensor([self.task_names.index(task_of(p)) for p in prompts], device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """``overall`` and each task's mean."""
        values, tasks = dim_zero_cat(self.values), dim_zero_cat(self.tasks)
        means = {name: values[tasks == i].mean() for i, name in enumerate(self.task_names)}
        overall = torch.stack(list(means.values())).mean()
        return {"overall": overall} if self.task_names == [NO_TASK] else {"overall": overall, **means}

    def intervals(self) -> dict[str, Interval]:
        """The same with 95% bootstrap intervals over pictures, resampled within tasks; for a finished metric."""
        values, tasks = dim_zero_cat(self.values).double(), dim_zero_cat(self.tasks)
        by_task = [values[tasks == i].numpy() for i in range(len(self.task_names))]
        out = {"overall": _bootstrap(by_task)}
        if self.task_names != [NO_TASK]:
            out |= {name: _bootstrap([part]) for name, part in zip(self.task_names, by_task, strict=True)}
        return out


def _bootstrap(parts: list[Any]) -> Interval:
    from scipy.stats import bootstrap

    def mean_of_means(*samples: Any, axis: int = -1) -> Any:
        return sum(sample.mean(axis=axis) for sample in samples) / len(samples)

    mean = float(mean_of_means(*parts))
    if all(part.min() == part.max() for part in parts):
        return Interval(mean, mean, mean)
    # The percentile method, since bias correction is undefined where one task is all right or all wrong.
    result = bootstrap(parts, mean_of_means, n_resamples=2000, method="percentile", rng=0)
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def task_of(prompt: Prompt) -> str:
    """The prompt's GenEval task, or ``all`` where it has none."""
    return str(prompt.metadata.get("tag", NO_TASK))


class GenEvalScore(TaskScore):
    """Share of pictures that the Shapes detector finds right under GenEval's rules."""

    name = "geneval"

    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """See :meth:`TaskScore.judge`."""
        from gdmd_lightning.shapes.detector import detect, verdict

        return torch.from_numpy(verdict(detect(images), prompts)).float()


class RewardScore(TaskScore):
    """Mean reward.

    Args:
        reward: Any; its name is the score's.
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = reward
        self.name = reward.name

    @torch.no_grad()
    def judge(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """See :meth:`TaskScore.judge`."""
        self.reward.to(images.device)
        return checked_score(self.reward, images, prompts)
