"""GNDM and GNDMR: distribution matching normalized within a prompt's group, and read as one reward among others.

Source: R_dm (2603.28460), of which we could read the abstract; ``docs/methods/gndm.md`` says which choices are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.engines.base import Learn
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch
from gdmd_lightning.methods.base import State, Update, weighted_sum
from gdmd_lightning.methods.matching import Match, MatchingModule
from gdmd_lightning.methods.reward_terms import Policy, policy_noise, policy_term
from gdmd_lightning.objectives.advantages import Spread, group_advantages, group_mean
from gdmd_lightning.objectives.distribution_matching import dm_loss, dm_reward
from gdmd_lightning.objectives.policy import optimality
from gdmd_lightning.ranges import NonNegative, Positive, ranged
from gdmd_lightning.ranks import all_groups, gathered, own_part, std
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import RoleSpec


class GNDM(MatchingModule):
    """Distribution matching whose gradients share one normalizer, and one renoise level, within a prompt's group."""

    needs_groups = True

    def group_match(self, x: Tensor, state: State, batch: Batch) -> tuple[Match, Tensor]:
        """Match samples ``[B, C, H, W]`` at one level per prompt; the normalizers ``[B]`` are means of groups.

        The level is shared so that members of a group differ in their direction, not in how noisy they are.
        """
        places = torch.arange(len(batch))
        first = torch.full_like(places, len(batch)).scatter_reduce(0, batch.groups, places, "amin")[batch.groups]
        match = self.match(x, batch.conditioning, self.draw_renoise(state).with_levels_of(first))
        return match, group_mean(match.n, batch.groups.to(x.device))

    def update(self, batch: Batch, learn: Learn) -> Update:
        """One generator step on the group-normalized loss, then the fake score's steps."""
        state = self.rollout_state(batch)
        parts = list(self.micro_batches(len(batch)))
        logs: dict[str, Tensor] = {}
        with learn("generator") as backward:
            # Whole groups are matched: with several micro-batches, first compute samples without gradient.
            with torch.set_grad_enabled(len(parts) == 1):
                x = self.student_x0(state.latents)
            match, n = self.group_match(x, state, batch)
            for rows, share in parts:
                part = x if len(parts) == 1 else self.student_x0(state.latents.select(rows))
                loss = dm_loss(part, match.target[rows], n[rows])
                backward(share * loss)
                weighted_sum(logs, share, loss=loss)
        logs |= {"normalizer": n.mean(), "sample_std": std(match.x)}
        return Update(logs | self.train_fake_score(batch, state, match.x, learn))


@ranged
@dataclass(frozen=True)
class CombinedAdvantages:
    """How distribution matching and a reward become one advantage, ``A_dm + weight A_reward``.

    Each is divided by its own standard deviation first, so their weights adapt to how much each differs in a batch.

    Args:
        weight: Weight of the reward, at least 0; distribution matching has weight 1.
        spread: Standard deviation to divide by, see :func:`group_advantages`.
        clip: ``A_max``, above 0. Source: DiffusionNFT's 5.

    Raises:
        UserError: If a value is out of range.
    """

    weight: NonNegative = 1.0
    spread: Spread = "batch"
    clip: Positive = 5.0

    def __call__(self, match: Match, rewards: Tensor, groups: Tensor) -> Tensor:
        """Advantages ``[B]`` of samples with these rewards ``[B]``, in these groups ``[B]``, on the CPU."""
        everywhere = all_groups(groups).to(rewards.device)
        matching, rewarded = (
            own_part(group_advantages(gathered(each), everywhere, self.spread))
            for each in (dm_reward(match.x, match.real, match.fake), rewards)
        )
        return matching + self.weight * rewarded


@ranged
class GNDMR(GNDM):
    """GNDM with a reward: both are judged in groups, and samples move toward the better ones.

    Args:
        family: The teacher's pipeline.
        reward: Judges samples.
        combination: How distribution matching and the reward are combined.
        policy: The velocity policies on renoised samples, in their full form at the ``target``.
        lambda_policy: Weight of the policy term, at least 0; 0 is GNDM.
        matching_module: Arguments of :class:`MatchingModule`.

    Raises:
        UserError: If a value is out of range.
    """

    judge: Judge

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        combination: CombinedAdvantages = CombinedAdvantages(),
        policy: Policy = Policy(),
        lambda_policy: NonNegative = 1.0,
        **matching_module: Any,
    ) -> None:
        super().__init__(family, **matching_module)
        if (policy.form, policy.at) != ("full", "target"):
            raise UserError(
                f"form is {policy.form!r} and at {policy.at!r}, but a sample is its own target",
                where="model.policy",
                remedy="use form: full and at: target",
            )
        self.combination, self.policy, self.lambda_policy = combination, policy, lambda_policy
        self.judge = self.judge_with(reward)

    def role_specs(self) -> tuple[RoleSpec, ...]:
        """The roles of distribution matching, and the old policy."""
        return (*super().role_specs(), RoleSpec("old", average_of="generator", decay=self.policy.old_decay))

    def update(self, batch: Batch, learn: Learn) -> Update:
        """GNDM's update with a policy term on the samples, which are judged in their groups."""
        self.judge.check(batch.prompts)
        state = self.rollout_state(batch)
        parts = list(self.micro_batches(len(batch)))
        logs: dict[str, Tensor] = {}
        with learn("generator") as backward:
            with torch.set_grad_enabled(len(parts) == 1):
                x = self.student_x0(state.latents)
            match, n = self.group_match(x, state, batch)
            rewards = self.judge(match.x, batch.prompts)
            advantages = self.combination(match, rewards.to(match.x), batch.groups)
            o = optimality(advantages, self.combination.clip)
            eps = policy_noise(self.policy, match.x[:, None], self.stream("policy"))[:, 0]
            for rows, share in parts:
                latents, y = state.latents.select(rows), match.x[rows]
                part = x if len(parts) == 1 else self.student_x0(latents)
                term = policy_term(self.roles, self.policy, part, latents, y, n[rows], o[rows], eps[rows])
                loss = dm_loss(part, match.target[rows], n[rows]) + self.lambda_policy * term
                backward(share * loss)
                weighted_sum(logs, share, loss=loss)
        logs |= {"normalizer": n.mean(), "sample_std": std(match.x), "reward_sample": rewards.mean()}
        return Update(logs | self.train_fake_score(batch, state, match.x, learn))
