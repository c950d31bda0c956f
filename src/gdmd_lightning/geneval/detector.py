"""The interface of detectors whose detections GenEval's rules judge."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gdmd_lightning.described import Described
from gdmd_lightning.geneval.rules import OFFICIAL, Detection, Rules
from gdmd_lightning.prompts import Prompt


class Detector(Described, ABC):
    """Finds objects in pictures.

    Attributes:
        rules: Thresholds that suit this detector's scores.
        classes, colors: The names that it can find; ``None`` for any.
    """

    rules: Rules = OFFICIAL
    classes: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None

    @abstractmethod
    def detect(self, images: Tensor, prompts: Sequence[Prompt]) -> list[list[Detection]]:
        """Find the objects of each picture.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            prompts: The prompt of each picture; a detector may skip classes and colors that it does not name.

        Returns:
            The detections of each picture, in any order.
        """

    def prepare(self) -> None:
        """Load the detector's models; called before training, so that nothing is missing later.

        Raises:
            UserError: If something is missing or broken.
        """

    def to(self, device: torch.device) -> None:
        """Move the detector's models to a device."""

    def sketch(self) -> nn.Module | None:
        """The detector's models on the meta device, for memory planning; ``None`` if it has none."""
        return None
