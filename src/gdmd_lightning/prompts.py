"""Prompts, alone and in batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """A text prompt.

    Args:
        text: The prompt itself.
        metadata: Further data from the prompt's source, empty for a plain line of text. Prompts that a
            detector evaluates have GenEval's keys: ``tag``, ``include``, ``exclude``.
    """

    text: str
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptBatch:
    """The prompts of one update on one rank; each prompt is repeated ``group_size`` times in a row.

    Args:
        prompts: One prompt per sample, ``B`` in total.
        group_size: Number of samples per prompt; divides ``B``.
    """

    prompts: tuple[Prompt, ...]
    group_size: int

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def groups(self) -> Tensor:
        """Index of each sample's prompt group, ``[B]``."""
        import torch  # takes seconds, which wrong arguments of a command should not wait for

        return torch.arange(len(self.prompts)) // self.group_size
