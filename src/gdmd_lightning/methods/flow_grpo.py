"""Flow-GRPO: policy gradient on the steps of an SDE sampler, held near the frozen teacher.

Source: Flow-GRPO (2505.05470), Algorithm 1.
"""

from __future__ import annotations

from typing import Any

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import Update, weighted_sum
from gdmd_lightning.methods.grpo_terms import GRPO, grpo_term
from gdmd_lightning.methods.policy_module import PolicyModule
from gdmd_lightning.objectives.grpo import step_kl
from gdmd_lightning.ranges import NonNegative, ranged
from gdmd_lightning.ranks import std
from gdmd_lightning.rewards.base import Reward


@ranged
class FlowGRPO(PolicyModule):
    """GRPO on a flow model; it needs at least 2 steps.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        grpo: Rollouts and the clipped ratio.
        kl_weight: Weight of the KL divergence from the steps of ``kl_reference``, at least 0; 0 for none, which saves
            its evaluations.
        policy_module: Arguments of :class:`PolicyModule`.

    Raises:
        UserError: If a value is out of range.
    """

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        grpo: GRPO = GRPO(),
        kl_weight: NonNegative = 0.04,
        **policy_module: Any,
    ) -> None:
        super().__init__(family, reward, kl_weight=kl_weight, **policy_module)
        grpo.check_steps(self.steps)
        self.grpo = grpo

    def update(self, batch: Batch, learn: Learn) -> Update:
        """Roll out and judge once, then step the generator on the trained steps of all samples."""
        self.judge.check(batch.prompts)
        steps = self.grpo.draw_steps(self.steps, self.stream("train steps").common)
        shared = self.grpo.shared_noise(self.steps, steps, batch.groups)
        path = self.rollout(batch, sampler=self.grpo.sampler, shared=shared)
        judged = self.sample_advantages(self.judge, path.x0, batch, self.history)
        logs = {"sample_std": std(path.x0)} | judged.logs(self.grpo.advantage_clip)
        for _ in range(self.inner_epochs):
            with learn("generator") as backward:
                for k in steps:
                    for rows, share in self.micro_batches(len(batch)):
                        part, conditioning = path.select(rows), batch.conditioning.select(rows)
                        predict = self.predictor("generator", conditioning)
                        loss, now, clipped = grpo_term(predict, self.grpo, part, k, judged.advantages[rows])
                        weight = share / len(steps)
                        if self.kl_weight > 0:
                            reference = self.predictor(self.reference, conditioning, self.kl_guidance_scale)
                            kl = step_kl(now.mean, part.redo(reference, k).mean, now.std).mean()
                            loss = loss + self.kl_weight * kl
                            weighted_sum(logs, weight / self.inner_epochs, kl=kl)
                        backward(weight * loss)
                        weighted_sum(logs, weight / self.inner_epochs, loss=loss, clipped=clipped)
        return Update(logs)
