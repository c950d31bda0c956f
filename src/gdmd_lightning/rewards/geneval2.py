"""GenEval 2's Soft-TIFA as a reward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.answers import Answers
from gdmd_lightning.geneval.questions import check_questions, questions_of
from gdmd_lightning.geneval.soft_tifa import MEANS, Mean, soft_tifa
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.network import check_pictures


class GenEval2Reward(Reward):
    """How probable a vision-language model finds the right answers to the prompt's questions, in [0, 1].

    Source: GenEval 2 (2512.16853).

    Args:
        answers: The model.
        mean: Over the questions of a prompt: ``geometric`` for Soft-TIFA GM, which estimates whether the whole prompt
            is right; ``arithmetic`` for Soft-TIFA AM, the share of its atoms that are.
        name: Name in logs.

    Raises:
        UserError: If the mean is unknown.
    """

    differentiable = True

    def __init__(self, answers: Answers, mean: Mean = "geometric", name: str = "geneval2") -> None:
        if mean not in MEANS:
            raise UserError(f"it is {mean!r}", where="GenEval2Reward.mean", remedy=f"use {' or '.join(MEANS)}")
        self.answers, self.mean, self.name = answers, mean, name
        self.differentiable = answers.differentiable

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.stack([soft_tifa(each, self.mean) for each in self.log_probabilities(images, prompts)])

    def log_probabilities(self, images: Tensor, prompts: Sequence[Prompt]) -> list[Tensor]:
        """Log-probability of each right answer, ``[n]`` for each picture whose prompt has ``n`` questions."""
        check_pictures(images, [prompt.text for prompt in prompts], f"reward {self.name!r}")
        self.check(prompts)
        return self.answers.log_probabilities(images, [questions_of(prompt) for prompt in prompts])

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_questions(prompts, f"reward {self.name!r}")

    def prepare(self) -> None:
        self.answers.prepare()

    def to(self, device: torch.device) -> None:
        self.answers.to(device)

    def sketch(self) -> nn.Module | None:
        return self.answers.sketch()
