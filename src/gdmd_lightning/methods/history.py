"""Rewards that a prompt's samples got in earlier updates, to compare its new samples with.

Source: per-prompt statistics of DDPO (2305.13301), appendix D; its code keeps the last 32 rewards of a prompt and uses
them from 16 on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, distributed

from gdmd_lightning.errors import UserError
from gdmd_lightning.objectives.advantages import Past
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Count, ranged


@ranged
@dataclass(frozen=True)
class RunningStatistics:
    """Compare samples with the prompt's recent rewards, of earlier updates too, instead of their group alone.

    Rewards are read on the CPU, so every update waits for the device.

    Args:
        size: Rewards remembered per prompt, the latest ones, including those of the update itself.
        at_least: With fewer rewards a prompt's samples are compared within their group.

    Raises:
        UserError: If ``at_least`` is larger than ``size``.
    """

    size: Count = 32
    at_least: Count = 16

    def __post_init__(self) -> None:
        if self.at_least > self.size:
            raise UserError(
                f"it is {self.at_least}, but only {self.size} rewards are remembered",
                where="model.sample_advantages.running.at_least",
                remedy="use at most model.sample_advantages.running.size",
            )


class PromptHistory:
    """The latest rewards of each prompt; the same on all ranks, and part of the checkpoint.

    Attributes:
        reward: Digest of the settings of the reward that gives them; empty if it is not known.
    """

    def __init__(self) -> None:
        self.reward = ""
        self._rewards: dict[str, deque[tuple[float, ...]]] = {}

    def add(self, prompts: Sequence[Prompt], rewards: Tensor, settings: RunningStatistics) -> list[Past]:
        """Remember an update's rewards on all ranks, then say what is known of each sample's prompt.

        Args:
            prompts: One per sample.
            rewards: ``[B, R]``, one column per reward.
            settings: How many to remember, and from how many on to use them.

        Returns:
            One entry per reward, each with the rows of all ranks, in the order of ranks, on the rewards' device.
        """
        mine = [(prompt.text, tuple(row)) for prompt, row in zip(prompts, rewards.tolist(), strict=True)]
        every = _of_all_ranks(mine)
        for text, row in every:
            kept = self._rewards.get(text)
            # Another number of rewards: the run was resumed with others, which these do not describe.
            if kept is None or len(kept[-1]) != len(row) or kept.maxlen != settings.size:
                kept = deque(kept if kept is not None and len(kept[-1]) == len(row) else (), maxlen=settings.size)
                self._rewards[text] = kept
            kept.append(row)
        past = [torch.tensor(list(self._rewards[text]), dtype=torch.float64) for text, _ in every]
        known = torch.tensor([len(each) >= settings.at_least for each in past], device=rewards.device)
        mean = torch.stack([each.mean(0) for each in past]).to(rewards)
        std = torch.stack([each.std(0, correction=0) for each in past]).to(rewards)
        return [Past(mean[:, i], std[:, i], known) for i in range(rewards.shape[1])]

    def __len__(self) -> int:
        return len(self._rewards)

    def state_dict(self) -> dict[str, Any]:
        """The reward's digest, texts, and their rewards one after another as one tensor."""
        kept = [torch.tensor(list(each), dtype=torch.float64) for each in self._rewards.values()]
        return {
            "reward": self.reward,
            "texts": list(self._rewards),
            "counts": [len(each) for each in kept],
            "rewards": [each.flatten() for each in kept],
        }

    def load_state_dict(self, state: Any) -> None:
        """Continue from a checkpoint's history; warn and begin a new one if that is of another reward.

        One of an earlier version does not say which reward it is of, and is continued.

        Raises:
            UserError: If it is not one.
        """
        try:
            there = state.get("reward", "")
            self._rewards = {
                str(text): deque(tuple(row) for row in values.view(count, -1).tolist())
                for text, count, values in zip(state["texts"], state["counts"], state["rewards"], strict=True)
            }
        except (TypeError, LookupError, AttributeError, RuntimeError, ValueError) as error:
            raise UserError(f"its rewards of prompts are malformed: {error}", where="checkpoint") from error
        if there and self.reward and there != self.reward:
            self._rewards.clear()
            rank_zero_warn(
                "the reward has other settings than in the checkpoint: samples are not compared with the rewards that "
                "their prompts got there, and sample_advantages.running begins again"
            )


def _of_all_ranks(mine: list[tuple[str, tuple[float, ...]]]) -> list[tuple[str, tuple[float, ...]]]:
    """The rows of all ranks, in the order of ranks; all ranks must call this."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return mine
    every: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(every, mine)
    return [row for rows in every for row in rows]
