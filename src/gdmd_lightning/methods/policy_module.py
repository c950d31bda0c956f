"""What methods share that learn from judged samples of whole rollouts and not from distillation."""

from __future__ import annotations

from typing import Any

from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.ranges import Count, NonNegative, Steps, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge


@ranged
class PolicyModule(DistillationModule):
    """All samples of an update are rolled out and judged once, and compared within their prompts.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        steps: Steps of a rollout, and of generation.
        sample_advantages: How rewards become advantages.
        kl_weight: Weight of the distance from the frozen teacher, at least 0; 0 for none, which saves the teacher's
            evaluations.
        inner_epochs: Generator steps per update, all on the same judged samples, at least 1.
        distillation: Arguments of :class:`DistillationModule`.

    Raises:
        UserError: If a value is out of range.
    """

    judge: Judge
    needs_groups = True

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        steps: Steps = 10,
        sample_advantages: SampleAdvantages = SampleAdvantages(),
        kl_weight: NonNegative = 0.0,
        inner_epochs: Count = 1,
        **distillation: Any,
    ) -> None:
        super().__init__(family, steps=steps, **distillation)
        self.sample_advantages = sample_advantages
        self.kl_weight, self.inner_epochs = kl_weight, inner_epochs
        self.judge = self.judge_with(reward)
