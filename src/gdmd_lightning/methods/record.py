"""What a method reports about its judged targets, for logs, the record of gradient rewards and the notebook."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from gdmd_lightning.objectives.policy import gradient_weight
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranks import gathered, std


@dataclass(frozen=True)
class JudgedTargets:
    """The targets of one update, ``M`` for each of ``B`` samples.

    Args:
        prompts: One prompt per sample.
        x: Samples, ``[B, C, H, W]``.
        targets: Implicit targets, ``[B, M, C, H, W]``.
        sigma: Level of each sample's state, ``[B]``.
        renoise_sigma: Renoise level of each target, ``[B, M]``.
        snapshot: Past state of the fake score that gave each target, ``[M]``; 0 is the current one.
        gradient: Mean magnitude of each normalized distillation gradient, ``[B, M]``.
        rewards: Rewards of the targets, ``[B, M]``.
        sample_reward: Rewards of the samples, ``[B]``; ``None`` if they were not scored.
        advantages: ``[B, M]``.
        without_spread: Share of groups whose advantages are all 0, scalar.
        optimality: ``[B, M]``, in [0, 1].
        lambda_policy: Weight of the policy term.
    """

    prompts: tuple[Prompt, ...]
    x: Tensor
    targets: Tensor
    sigma: Tensor
    renoise_sigma: Tensor
    snapshot: Tensor
    gradient: Tensor
    rewards: Tensor
    sample_reward: Tensor | None
    advantages: Tensor
    without_spread: Tensor
    optimality: Tensor
    lambda_policy: float

    def weight(self) -> Tensor:
        """Signed weight of each distillation gradient, to first order, ``[B, M]``."""
        return gradient_weight(self.optimality, 2 * self.lambda_policy)

    def without_latents(self) -> JudgedTargets:
        """A copy without samples and targets, small enough to keep until the record is written."""
        return replace(self, x=self.x[:0], targets=self.targets[:0])

    def logs(self) -> dict[str, Tensor]:
        """Scalars to log, on the device."""
        spread = self.rewards.std(1).mean() if self.rewards.shape[1] > 1 else std(self.rewards)
        logs = {
            "reward_target": self.rewards.mean(),
            "reward_spread": spread,
            "gradient": self.gradient.mean(),
            "groups_without_spread": self.without_spread,
            "sample_std": std(self.x),
            "weight_negative": (self.weight() < 0).float().mean(),
            "advantage_clipped": ((self.optimality <= 0) | (self.optimality >= 1)).float().mean(),
            "advantage_level_correlation": correlation(gathered(self.advantages), gathered(self.renoise_sigma)),
        }
        if self.sample_reward is not None:
            logs["reward_sample"] = self.sample_reward.mean()
            logs["targets_better"] = (self.rewards > self.sample_reward[:, None]).float().mean()
        return logs


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation over all elements; 0 where either is constant."""
    a, b = a.flatten() - a.mean(), b.flatten() - b.mean()
    return (a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-8)
