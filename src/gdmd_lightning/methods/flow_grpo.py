"""Flow-GRPO: policy gradient on the steps of an SDE sampler, held near the frozen teacher.

Source: Flow-GRPO (2505.05470), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.base import DistillationModule, Update, weighted_sum
from gdmd_lightning.methods.grpo_terms import GRPO, grpo_term
from gdmd_lightning.objectives.grpo import step_kl
from gdmd_lightning.ranges import Count, NonNegative, Steps, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge


@ranged
class FlowGRPO(DistillationModule):
    """GRPO on a flow model: all samples of an update are rolled out once and compared within their prompts.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        steps: Steps of a rollout, and of generation, at least 2.
        grpo: Rollouts and the clipped ratio.
        sample_advantages: How rewards become advantages.
        kl_weight: Weight of the KL divergence from the frozen teacher's steps, at least 0; 0 for none, which saves the
            teacher's evaluations.
        inner_epochs: Generator steps per update, all on the same rollouts, at least 1.
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
        grpo: GRPO = GRPO(),
        sample_advantages: SampleAdvantages = SampleAdvantages(),
        kl_weight: NonNegative = 0.04,
        inner_epochs: Count = 1,
        **distillation: Any,
    ) -> None:
        super().__init__(family, steps=steps, **distillation)
        grpo.check_steps(steps)
        self.grpo, self.sample_advantages = grpo, sample_advantages
        self.kl_weight, self.inner_epochs = kl_weight, inner_epochs
        self.judge = self.judge_with(reward)

    def update(self, batch: Batch, learn: Learn) -> Update:
        """Roll out and judge once, then step the generator on the trained steps of all samples."""
        self.judge.check(batch.prompts)
        path = self.rollout(batch, sampler=self.grpo.sampler)
        judged = self.sample_advantages(self.judge, path.x0, batch, self.history)
        steps = self.grpo.draw_steps(self.steps, self.stream("train steps"))
        logs = {"sample_std": path.x0.std()} | judged.logs(self.grpo.advantage_clip)
        for _ in range(self.inner_epochs):
            with learn("generator") as backward:
                for k in steps:
                    for rows, share in self.micro_batches(len(batch)):
                        part, conditioning = path.select(rows), batch.conditioning.select(rows)
                        predict = self.predictor("generator", conditioning)
                        loss, now, clipped = grpo_term(predict, self.grpo, part, k, judged.advantages[rows])
                        weight = share / len(steps)
                        if self.kl_weight > 0:
                            base = part.redo(self.predictor("teacher", conditioning), k)
                            kl = step_kl(now.mean, base.mean, now.std).mean()
                            loss = loss + self.kl_weight * kl
                            weighted_sum(logs, weight / self.inner_epochs, kl=kl)
                        backward(weight * loss)
                        weighted_sum(logs, weight / self.inner_epochs, loss=loss, clipped=clipped)
        return Update(logs)
