"""GenEval's verdict on a picture as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.grades import partial_score
from gdmd_lightning.geneval.metadata import check_metadata
from gdmd_lightning.geneval.rules import verdict
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.network import check_pictures

Grading = Literal["strict", "graded"]


class GenEvalReward(Reward):
    """Whether a picture shows what its prompt's GenEval metadata asks for.

    Args:
        detector: Finds the objects.
        grading: ``strict`` for 1 or 0, the verdict; ``graded`` for the share of the requirements that hold.
        name: Name in logs.

    Raises:
        UserError: If the grading is unknown.
    """

    def __init__(self, detector: Detector, grading: Grading = "strict", name: str = "geneval") -> None:
        if grading not in ("strict", "graded"):
            raise UserError(f"unknown grading {grading!r}", where="reward.grading", remedy="use strict or graded")
        self.detector, self.grading, self.name = detector, grading, name

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_pictures(images, [prompt.text for prompt in prompts], f"reward {self.name!r}")
        found = self.detector.detect(images, prompts)
        rules = self.detector.rules
        if self.grading == "graded":
            scores = [partial_score(each, p.metadata, rules) for each, p in zip(found, prompts, strict=True)]
        else:
            scores = [float(verdict(each, p.metadata, rules).correct) for each, p in zip(found, prompts, strict=True)]
        return torch.tensor(scores, dtype=torch.float32)

    def check(self, prompts: Sequence[Prompt]) -> None:
        check_metadata(prompts, f"reward {self.name!r}", classes=self.detector.classes, colors=self.detector.colors)

    def prepare(self) -> None:
        self.detector.prepare()

    def to(self, device: torch.device) -> None:
        self.detector.to(device)

    def sketch(self) -> nn.Module | None:
        return self.detector.sketch()
