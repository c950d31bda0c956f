"""RTDMD: policy gradient on the stochastic steps of rollouts; reward and distribution matching at their last step.

Source: stage 2 of RTDMD (2605.26108); ``methods/ac_dmd.py`` is its stage 1, from whose roles a run continues.
"""

from __future__ import annotations

from typing import Any

import torch

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, NoisyLatents
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.ambient import AmbientModule
from gdmd_lightning.methods.base import State, Update, weighted_sum
from gdmd_lightning.methods.grpo_terms import GRPO, grpo_term
from gdmd_lightning.methods.reward_terms import refl_loss, require_differentiable
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.ranges import Finite, NonNegative, ranged
from gdmd_lightning.ranks import std
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.samplers import CPS


@ranged
class RTDMD(AmbientModule):
    """SubGRPO on some of the stochastic steps; reward backpropagation and AC-DMD at the deterministic last one.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples; must be differentiable unless ``refl_weight`` is 0.
        grpo: Rollouts and the clipped ratio.
        sample_advantages: How rewards become advantages.
        grpo_weight: Weight of the policy gradient, at least 0.
        matching_weight: Weight of AC-DMD's loss at the last step, at least 0.
        refl_weight: Weight of the reward's own gradient through the last step, at least 0; 0 for none.
        margin: Samples with a reward of at least this much give no such gradient; null for no limit.
        matching: Settings of distribution matching, as in AC-DMD; ``fake_score_samples`` must be ``reused``.
        ambient_module: Arguments of :class:`AmbientModule`.

    Raises:
        UserError: If a value is out of range or has no meaning here.
    """

    judge: Judge

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        grpo: GRPO = GRPO(CPS(), clip=1e-5, log_prob="squared_error", train_steps=2),
        sample_advantages: SampleAdvantages = SampleAdvantages(),
        grpo_weight: NonNegative = 1.0,
        matching_weight: NonNegative = 1e-3,
        refl_weight: NonNegative = 1e-4,
        margin: Finite | None = 3.0,
        matching: Matching = Matching(fake_score_updates=1, interval="step"),
        **ambient_module: Any,
    ) -> None:
        super().__init__(family, matching=matching, **ambient_module)
        grpo.check_steps(self.steps)
        if refl_weight > 0:
            require_differentiable(reward, self.memory)
        if matching.fake_score_samples != "reused":
            raise UserError(
                f"fake_score_samples is {matching.fake_score_samples!r}, but the fake score learns from the rollouts",
                where="model.matching.fake_score_samples",
                remedy="use reused",
            )
        self.grpo, self.sample_advantages, self.margin = grpo, sample_advantages, margin
        self.grpo_weight, self.matching_weight, self.refl_weight = grpo_weight, matching_weight, refl_weight
        self.needs_groups = grpo_weight > 0
        self.judge = self.judge_with(reward)

    def update(self, batch: Batch, learn: Learn) -> Update:
        """Roll out and judge once; one generator step on all terms; then the fake score's steps."""
        self.judge.check(batch.prompts)
        steps = self.grpo.draw_steps(self.steps, self.stream("train steps").common) if self.grpo_weight > 0 else []
        shared = self.grpo.shared_noise(self.steps, steps, batch.groups) if steps else None
        path = self.rollout(batch, sampler=self.grpo.sampler, shared=shared)
        judging = self.grpo_weight > 0 or self.refl_weight > 0
        judged = self.sample_advantages(self.judge, path.x0, batch, self.history) if judging else None
        last = torch.full((len(batch),), self.steps - 1)
        state = State(NoisyLatents(path.states[-2], self.sigmas[last].to(path.x0), batch.conditioning), last)
        s, draw = self.ends(state), self.draw_renoise(state)
        logs = {"sample_std": std(path.x0)} | ({} if judged is None else judged.logs(self.grpo.advantage_clip))
        learned = len(steps) + 1  # the loss is the mean over these steps of the rollout, as in the authors' code
        with learn("generator") as backward:
            for k in steps:
                assert judged is not None, "steps are drawn only with a policy gradient"
                for rows, share in self.micro_batches(len(batch)):
                    predict, weight = self.predictor("generator", batch.conditioning.select(rows)), share / len(steps)
                    loss, _, clipped = grpo_term(predict, self.grpo, path.select(rows), k, judged.advantages[rows])
                    backward(share / learned * self.grpo_weight * loss)
                    weighted_sum(logs, weight, policy_loss=loss, clipped=clipped)
            for rows, share in self.micro_batches(len(batch)):
                latents = state.latents.select(rows)
                none = torch.zeros_like(latents.x)  # a step to level 0 is deterministic, there and back
                x, match, matching = self.transition_loss(latents, s[rows], draw.select(rows), none, none)
                loss = self.matching_weight * matching
                if self.refl_weight > 0:
                    refl = refl_loss(self.judge(x, batch.prompts[rows], gradient=True), self.margin)
                    loss = loss + self.refl_weight * refl
                    weighted_sum(logs, share, refl_loss=refl)
                backward(share / learned * loss)
                weighted_sum(logs, share, matching_loss=matching, normalizer=match.n.mean())
        return Update(logs | self.train_ambient_fake_score(batch, state, path.x0, learn))
