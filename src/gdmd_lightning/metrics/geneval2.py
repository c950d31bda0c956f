"""GenEval 2's scores: Soft-TIFA by prompt, and the mean of the atoms of each skill."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from gdmd_lightning.geneval.answers import Answers
from gdmd_lightning.geneval.questions import SKILLS, questions_of
from gdmd_lightning.geneval.soft_tifa import Mean, soft_tifa
from gdmd_lightning.metrics.scores import RewardScore, exact_mean
from gdmd_lightning.prompts import Prompt
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
    atoms: list[Tensor]
    skills: list[Tensor]

    def __init__(self, answers: Answers, mean: Mean = "geometric", name: str = "geneval2") -> None:
        super().__init__(GenEval2Reward(answers, mean, name))
        self.add_state("atoms", default=[], dist_reduce_fx="cat")
        self.add_state("skills", default=[], dist_reduce_fx="cat")

    def begin(self, prompts: Sequence[Prompt]) -> None:
        super().begin(prompts)
        # See the base class: ranks must gather the same number of tensors.
        self.atoms.append(torch.zeros(0, device=self.device))
        self.skills.append(torch.zeros(0, dtype=torch.long, device=self.device))

    @torch.no_grad()
    def update(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        found = self.reward.log_probabilities(images, prompts)
        self.add(torch.stack([soft_tifa(each, self.reward.mean) for each in found]), prompts)
        numbers = [SKILLS.index(question.skill) for prompt in prompts for question in questions_of(prompt)]
        self.atoms.append(torch.cat(found).exp().to(self.device, torch.float32))
        self.skills.append(torch.tensor(numbers, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        atoms, skills = dim_zero_cat(self.atoms), dim_zero_cat(self.skills)
        parts = {skill: atoms[skills == number] for number, skill in enumerate(SKILLS)}
        return {**super().compute(), **{f"skill/{name}": exact_mean(part) for name, part in parts.items() if len(part)}}
