"""Prompts, alone and in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gdmd_lightning.errors import UserError

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


class PromptBatch:
    """The prompts of one update on one rank; each prompt is repeated ``group_size`` times in a row.

    It is not a dataclass: Lightning searches those for tensors to convert and move, and fails on frozen ones.

    Args:
        prompts: One prompt per sample, ``B`` in total, at least 1.
        group_size: Number of samples per prompt; divides ``B``.

    Raises:
        UserError: If there is no prompt, or ``group_size`` does not divide their number.
    """

    def __init__(self, prompts: Sequence[Prompt], group_size: int) -> None:
        self.prompts, self.group_size = tuple(prompts), group_size
        if not self.prompts or group_size < 1 or len(self.prompts) % group_size:
            raise UserError(
                f"the number of prompts is {len(self.prompts)}, not a positive multiple of group_size {group_size}",
                where="PromptBatch",
                remedy="repeat each prompt group_size times in a row",
            )

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def groups(self) -> Tensor:
        """Index of each sample's prompt group, ``[B]``."""
        import torch  # takes seconds, which wrong arguments of a command should not wait for

        return torch.arange(len(self.prompts)) // self.group_size
