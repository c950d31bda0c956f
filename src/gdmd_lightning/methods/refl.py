"""ReFL: the reward's own gradient, through the decoder and the last step of a rollout.

Source: ReFL in ImageReward (2304.05977), Algorithm 1, on a few-step generator.
"""

from __future__ import annotations

from typing import Any

import torch

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import DistillationModule, Update, weighted_sum
from gdmd_lightning.methods.reward_terms import refl_loss, require_differentiable
from gdmd_lightning.ranges import Finite, Positive, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge


@ranged
class ReFL(DistillationModule):
    """Reward backpropagation into the last step of a few-step generator.

    Args:
        family: The teacher's pipeline.
        reward: A differentiable reward.
        margin: Samples with a reward of at least this much give no gradient; null for no limit.
        weight: Factor on the loss.
        distillation: Arguments of :class:`DistillationModule`.

    Raises:
        UserError: If the reward is not differentiable.
    """

    judge: Judge

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        margin: Finite | None = None,
        weight: Positive = 1.0,
        **distillation: Any,
    ) -> None:
        super().__init__(family, **distillation)
        require_differentiable(reward, self.memory)
        self.margin, self.weight = margin, weight
        self.judge = self.judge_with(reward)

    def update(self, batch: Batch, learn: Learn) -> Update:
        """One generator step on ``weight * mean relu(margin - reward)``, or on ``-weight * mean reward``."""
        self.judge.check(batch.prompts)
        state = self.rollout_state(batch, step_index=self.steps - 1)
        logs: dict[str, torch.Tensor] = {}
        with learn("generator") as backward:
            for rows, share in self.micro_batches(len(batch)):
                x = self.student_x0(state.latents.select(rows))
                reward = self.judge(x, batch.prompts[rows], gradient=True)
                loss = self.weight * refl_loss(reward, self.margin)
                backward(share * loss)
                weighted_sum(logs, share, loss=loss, reward_sample=reward.mean())
        return Update(logs)
