"""Prompts as they travel through the house, alone and in batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A text prompt.

    Args:
        text: The prompt itself.
        metadata: What the source of the prompt knows beside its text, in GenEval's form where a detector
            judges it (``tag``, ``include``, ``exclude``); empty for a plain line of text.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one update on one rank: every prompt stands ``group_size`` times in a row.

    Args:
        prompts: One prompt a sample, ``B`` of them.
        group_size: How many samples a prompt gets; divides ``B``.
    """

    prompts: tuple[Prompt, ...]
    group_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def groups(self) -> Tensor:
        """Number of each sample's prompt, ``[B]``."""
        return torch.arange(len(self.prompts)) // self.group_size
