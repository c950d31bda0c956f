"""GDMD: the reward judges where the distillation gradient wants to take a sample, and the verdict weights it.

Source: GDMD (2604.19009), Algorithm 1. The sources leave some choices open; each is a switch here, and the page
``docs/methods.md`` says which default is ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.data.embedding_cache import EmbeddingCache
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import Conditioning, ModelFamily
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.settings import Matching, Memory, Optimization
from gdmd_lightning.methods.targets import Targets
from gdmd_lightning.methods.verdicts import Judged, Verdict, correlation
from gdmd_lightning.objectives.distribution_matching import dm_loss, normaliser
from gdmd_lightning.objectives.policy import gradient_weight, optimality, policy_loss, policy_pair
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.rewards.base import Reward, judge
from gdmd_lightning.roles import LoRA
from gdmd_lightning.samplers import FewStepSampler, State, draw_noise
from gdmd_lightning.schedules import draw_levels, renoise, x0_from_velocity


@dataclass(frozen=True)
class TargetGroup:
    """The implicit targets of one student state.

    Args:
        size: How many, ``M``.
        over: What tells them apart: the ``renoise`` level, the fake score's ``snapshot``, or ``both``.
        snapshots: How many past fake scores stand beside the present one, where they are asked.
        snapshot_every: Updates between two snapshots.
    """

    size: int = 4
    over: Literal["renoise", "snapshot", "both"] = "renoise"
    snapshots: int = 2
    snapshot_every: int = 20


@dataclass(frozen=True)
class Policy:
    """How a verdict moves the generator.

    Args:
        form: ``full``: positive and negative velocity policies; ``weighted``: their first order, a signed weight
            on each distillation gradient, as cheap as distillation plus rewards.
        at: Where the policies are evaluated: at the student's ``state``, or at the ``target`` renoised to the
            state's level, as DiffusionNFT treats its samples.
        beta: Mixture strength, above 0.
        normalise: What divides a squared error: distillation's ``n``, or the mean absolute ``error`` of each policy
            itself, detached, as in DiffusionNFT; at the state and ``v = v_old`` the former gives the exact weights.
        old_decay: Of the average of the generator that is the old policy.
    """

    form: Literal["full", "weighted"] = "full"
    at: Literal["state", "target"] = "target"
    normalise: Literal["distillation", "error"] = "error"
    beta: float = 1.0
    old_decay: float = 0.9


class GDMD(DistillationModule):
    """Distribution matching whose gradients are judged by a reward.

    Args:
        reward: The judge of decoded targets.
        targets: The group of implicit targets of a state.
        verdict: How rewards become advantages.
        policy: How advantages become an update.
        lambda_policy: Weight of the policy's loss beside distillation's, at least 0.

    The other arguments are :class:`DistillationModule`'s.
    """

    def __init__(
        self,
        family: ModelFamily,
        reward: Reward,
        targets: TargetGroup = TargetGroup(),
        verdict: Verdict = Verdict(),
        policy: Policy = Policy(),
        lambda_policy: float = 1.0,
        height: int = 1024,
        width: int = 1024,
        sampler: FewStepSampler = FewStepSampler(),
        matching: Matching = Matching(),
        generator: Optimization = Optimization(),
        critic: Optimization = Optimization(),
        lora: LoRA | None = None,
        memory: Memory = Memory(),
        embedding_cache: EmbeddingCache | None = None,
        ema_decay: float = 0.99,
        seed: int = 0,
        start_from: str | None = None,
    ) -> None:
        if policy.beta <= 0 or lambda_policy < 0:
            raise UserError(
                f"policy.beta is {policy.beta} and lambda_policy {lambda_policy}",
                where="model",
                remedy="beta must be above 0, lambda_policy at least 0",
            )
        super().__init__(
            family, height, width, sampler, matching, generator, critic, lora, memory, embedding_cache, ema_decay,
            seed, start_from,
        )  # fmt: skip
        self.reward, self.targets, self.verdict, self.policy = reward, targets, verdict, policy
        self.lambda_policy = lambda_policy
        self.old_decay = policy.old_decay if policy.form == "full" else None
        self.snapshots = 0 if targets.over == "renoise" else targets.snapshots
        self.judged: Judged | None = None

    def generator_loss(
        self, batch: PromptBatch, conditioning: Conditioning
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """See :meth:`DistillationModule.generator_loss`."""
        state = self.rollout_state(batch, conditioning)
        x = self.student_x0(state, conditioning)
        targets = self.implicit_targets(x, conditioning, *self.draw_group(len(x)))
        rewards, own = self.judge(targets, x, batch.prompts)
        advantage = self.verdict.advantages(rewards, own, batch.groups.to(x.device))
        o = optimality(advantage, self.verdict.clip)

        each = x.repeat_interleave(self.targets.size, dim=0)
        y, n = targets.y.flatten(0, 1), targets.n.flatten()
        if self.policy.form == "weighted":
            weight = gradient_weight(o, 2 * self.lambda_policy).flatten()
            loss = dm_loss(each, y, n, weight)
        else:
            plus, minus = self.policies(x, state, targets, conditioning)
            scales = (normaliser(plus, y), normaliser(minus, y)) if self.policy.normalise == "error" else (n, n)
            policy = policy_loss(plus, minus, y, o.flatten(), *scales, self.policy.beta)
            loss = dm_loss(each, y, n) + self.lambda_policy * policy

        gradient = (x.detach()[:, None] - targets.y).abs().flatten(2).mean(2) / targets.n
        self.judged = Judged(
            state, x.detach(), targets, rewards, own, advantage, o, batch.prompts, self.lambda_policy, gradient
        )  # fmt: skip
        return loss, x, self._logs(self.judged)

    def draw_group(self, batch: int) -> tuple[Tensor, Tensor]:
        """Renoise levels ``[B, M]`` and fake-score snapshots ``[M]`` of the targets."""
        size, over = self.targets.size, self.targets.over
        drawn = draw_levels(self.matching.law, batch, 1 if over == "snapshot" else size, self.stream("level"))
        snapshot = (
            torch.zeros(size, dtype=torch.long) if over == "renoise" else torch.arange(size) % (self.snapshots + 1)
        )
        return drawn.expand(batch, size), snapshot

    @torch.no_grad()
    def judge(self, targets: Targets, x: Tensor, prompts: tuple[Prompt, ...]) -> tuple[Tensor, Tensor | None]:
        """Rewards of the decoded targets ``[B, M]``, and of the samples themselves ``[B]`` if the verdict asks."""
        latents = targets.y.flatten(0, 1)
        texts = [prompt for prompt in prompts for _ in range(self.targets.size)]
        if self.verdict.asks_for_samples:
            latents, texts = torch.cat([latents, x.detach()]), [*texts, *prompts]
        images = self.family.decode(latents)
        if self.memory.reward == "offloaded":
            self.reward.to(images.device)
        scores = judge(self.reward, images, texts)
        if self.memory.reward == "offloaded":
            self.reward.to(torch.device("cpu"))
        count = targets.level.numel()
        own = scores[count:] if self.verdict.asks_for_samples else None
        return scores[:count].view_as(targets.level), own

    def policies(self, x: Tensor, state: State, targets: Targets, conditioning: Conditioning) -> tuple[Tensor, Tensor]:
        """``x0`` of the positive and negative policies for each target, ``[B * M, C, H, W]``."""
        roles, size = self.networks, self.targets.size
        if self.policy.at == "state":
            old = roles.x0("old", state.x_sigma, state.sigma, conditioning)
            plus, minus = policy_pair(x, old, self.policy.beta)
            return plus.repeat_interleave(size, dim=0), minus.repeat_interleave(size, dim=0)
        y, sigma, many = targets.y.flatten(0, 1), state.sigma.repeat_interleave(size), conditioning.repeat(size)
        x_sigma = renoise(y, sigma, draw_noise(tuple(y.shape), self.stream("policy"), y.device))
        pair = policy_pair(
            roles.velocity("generator", x_sigma, sigma, many),
            roles.velocity("old", x_sigma, sigma, many),
            self.policy.beta,
        )
        return x0_from_velocity(x_sigma, pair[0], sigma), x0_from_velocity(x_sigma, pair[1], sigma)

    def on_fit_start(self) -> None:
        """See :meth:`DistillationModule.on_fit_start`; the reward goes where it is to judge."""
        super().on_fit_start()
        if self.memory.reward == "accelerator":
            self.reward.to(self.device)

    def on_train_batch_start(self, batch: PromptBatch, batch_index: int) -> None:
        """See that the reward can judge these prompts; keep a snapshot of the fake score when it is due.

        Checkpoints are saved before a module's own end of a batch; at the start, a resumed run keeps the same one.
        """
        self.reward.check(batch.prompts)
        if self.snapshots and self.updates % self.targets.snapshot_every == 0:
            self.networks.keep_snapshot(self.updates // self.targets.snapshot_every % self.snapshots)

    @staticmethod
    def _logs(judged: Judged) -> dict[str, Tensor]:
        logs = {
            "reward_target": judged.rewards.mean(),
            "reward_spread": judged.rewards.std(1).mean() if judged.rewards.shape[1] > 1 else judged.rewards.std(),
            "gradient": judged.gradient.mean(),
            "weight_negative": (judged.weight() < 0).float().mean(),
            "advantage_level_correlation": correlation(judged.advantage, judged.targets.level),
        }
        if judged.own is not None:
            logs["reward_sample"] = judged.own.mean()
            logs["targets_better"] = (judged.rewards > judged.own[:, None]).float().mean()
        return logs
