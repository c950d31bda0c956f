"""The interface of detectors whose detections GenEval's rules judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from gdmd_lightning.geneval.rules import OFFICIAL, Detection, Rules
from gdmd_lightning.prompts import Prompt


class Detector(ABC):
    """Finds objects in pictures.

    Attributes:
        rules: Thresholds that suit this detector's scores.
    """

    rules: Rules = OFFICIAL

    @abstractmethod
    def detect(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """Find the objects of each picture.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            prompts: The prompt of each picture; a detector may skip classes and colors that it does not name.

        Returns:
            The detections of each picture, in any order.
        """
