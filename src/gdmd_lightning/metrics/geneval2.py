"""GenEval 2's scores: Soft-TIFA by prompt, and the mean over the questions of each skill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdmd_lightning.geneval.answers import Answers
from gdmd_lightning.geneval.questions import questions_of
from gdmd_lightning.geneval.soft_tifa import Mean, soft_tifa
from gdmd_lightning.metrics.scores import RewardScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import checked_score
from gdmd_lightning.rewards.geneval2 import GenEval2Reward


class GenEval2Score(RewardScore):
    """Soft-TIFA of pictures, and ``skill/<skill>``: the mean probability of the right answers to its questions.

    With ``tag: atom_count`` the score is also reported for each number of atoms, as GenEval 2 does.

    Source: facebookresearch/GenEval2, ``soft_tifa_analysis.py``.

    Args:
        answers: The model that answers the questions.
        mean: Of a prompt's atoms; see :class:`GenEval2Reward`.
        name: Name in logs.
    """

    reward: GenEval2Reward

    def __init__(self, answers: Answers, mean: Mean = "geometric", name: str = "geneval2") -> None:
        super().__init__(GenEval2Reward(answers, mean, name))

    def part_names(self, prompt: Prompt) -> list[str]:
        return [f"skill/{question.skill}" for question in questions_of(prompt)]

    @torch.no_grad()
    def judge_parts(self, images: Tensor, prompts: Sequence[Prompt]) -> tuple[Tensor, list[Tensor]]:
        found: list[Tensor] = []

        def score(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            found.extend(self.reward.log_probabilities(images, prompts))
            return torch.stack([soft_tifa(each, self.reward.mean) for each in found])

        return checked_score(self.reward, images, prompts, score), [each.exp() for each in found]
