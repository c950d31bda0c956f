"""Loss terms of rewards, for use in any method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.methods.settings import Memory, refuse_unused
from gdmd_lightning.objectives.distribution_matching import normalizer
from gdmd_lightning.objectives.policy import policy_loss, policy_pair
from gdmd_lightning.ranges import Decay, Positive, ranged
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.roles import Roles
from gdmd_lightning.schedules import renoise
from gdmd_lightning.streams import BatchStream, draw_noise


@ranged
@dataclass(frozen=True)
class Policy:
    """How advantages move the generator.

    Args:
        form: ``full``: positive and negative velocity policies; ``weighted``: their first-order equivalent, a
            signed weight on each distillation gradient, without extra network evaluations.
        at: Where the policies are evaluated: at the student's ``state``, or at the ``target`` renoised to the state's
            level, as DiffusionNFT treats its samples.
        normalize: What squared errors are divided by: ``distillation``'s ``n``, or the detached mean absolute
            ``error`` of each policy, as in DiffusionNFT. At the state and ``v = v_old`` the former gives the
            exact weights.
        beta: Strength of the mixture.
        old_decay: Decay of the averaged generator that is the old policy.

    Raises:
        UserError: If a value is out of range, or another setting than ``form`` is changed for the weighted one.
    """

    form: Literal["full", "weighted"] = "full"
    at: Literal["state", "target"] = "target"
    normalize: Literal["distillation", "error"] = "error"
    beta: Positive = 1.0
    old_decay: Decay = 0.9

    def __post_init__(self) -> None:
        if self.form == "weighted":
            refuse_unused(self, "model.policy", "form weighted", "at", "normalize", "beta", "old_decay")


def policy_noise(policy: Policy, targets: Tensor, rng: BatchStream) -> Tensor:
    """Noise that renoises targets ``[B, M, C, H, W]`` for :func:`policy_term`; zeros if it needs none."""
    if policy.form == "weighted" or policy.at == "state":
        return torch.zeros_like(targets)
    return draw_noise(tuple(targets.shape), rng, targets.device)


def policy_term(
    roles: Roles, policy: Policy, x: Tensor, latents: NoisyLatents, y: Tensor, n: Tensor, o: Tensor, eps: Tensor
) -> Tensor:
    """Loss of the positive and negative velocity policies on judged targets.

    Args:
        roles: Include ``generator``, which is learning, and ``old``.
        policy: Settings of the full form.
        x: Samples, with gradient, ``[B, C, H, W]``.
        latents: The states that the samples were computed from, ``B`` rows.
        y: Judged targets, ``[B * M, C, H, W]``, grouped by sample.
        n: Distillation's normalizers, ``[B * M]``.
        o: Optimalities, ``[B * M]``, in [0, 1].
        eps: Noise that renoises the targets, ``[B * M, C, H, W]``; unused at the state.

    Source: DiffusionNFT (2509.16117), section 3.
    """
    size = len(y) // len(x)
    if policy.at == "state":
        plus, minus = policy_pair(x, roles.x0("old", latents), policy.beta)
        plus, minus = plus.repeat_interleave(size, dim=0), minus.repeat_interleave(size, dim=0)
    else:
        sigma = latents.sigma.repeat_interleave(size)
        at_target = NoisyLatents(renoise(y, sigma, eps), sigma, latents.conditioning.repeat(size))
        v, v_old = (roles.velocity(role, at_target) for role in ("generator", "old"))
        plus, minus = (at_target.x0(velocity) for velocity in policy_pair(v, v_old, policy.beta))
    scales = (normalizer(plus, y), normalizer(minus, y)) if policy.normalize == "error" else (n, n)
    return policy_loss(plus, minus, y, o, *scales, policy.beta)


def refl_loss(rewards: Tensor, margin: float | None) -> Tensor:
    """``mean relu(margin - r)``, or ``-mean r`` without a margin, of rewards ``[B]`` with gradient.

    Source: ReFL in ImageReward (2304.05977), Algorithm 1.
    """
    return (-rewards if margin is None else torch.relu(margin - rewards)).mean()


def require_differentiable(reward: Reward, memory: Memory) -> None:
    """Fail if a reward carries no gradient, or would leave the device before the backward pass through it.

    Raises:
        UserError: If it does not, or would.
    """
    if not reward.differentiable:
        raise UserError(
            f"{reward.name!r} is not differentiable", where="model.reward", remedy="use a differentiable reward"
        )
    if memory.reward == "offloaded":
        raise UserError(
            "it is offloaded, but the backward pass through the reward needs its weights on the device",
            where="model.memory.reward",
            remedy="use accelerator or cpu",
        )
