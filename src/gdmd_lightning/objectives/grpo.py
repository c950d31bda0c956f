"""Policy gradients on sampler steps: the clipped ratio, and the distance to the frozen base.

Source: GRPO (2402.03300), Eq. 3; on the steps of a diffusion sampler Flow-GRPO (2505.05470), Eqs. 6 and 10.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gdmd_lightning.schedules import per_sample


def policy_ratio(log_prob: Tensor, log_prob_old: Tensor) -> Tensor:
    """``ratio = exp(log p - log p_old)``, ``[B]``; only ``log_prob`` carries gradient."""
    return torch.exp(log_prob - log_prob_old.detach())


def clipped_ratio_loss(ratio: Tensor, advantages: Tensor, clip: float, advantage_clip: float) -> Tensor:
    """``mean_B max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip))`` with ``A`` clamped to ``[-A_max, A_max]``.

    At ``ratio = 1`` its gradient is that of ``-mean_B A log p``. A ratio that has already moved beyond the clip, in
    the direction of its advantage, gives no gradient; one exactly at the clip still does.

    Args:
        ratio: ``[B]``, with gradient.
        advantages: ``[B]``; detached here.
        clip: Largest useful distance of the ratio from 1, above 0.
        advantage_clip: ``A_max``, above 0.
    """
    a = advantages.detach().to(ratio.dtype).clamp(-advantage_clip, advantage_clip)
    # The same as the maximum above, whose gradient at a tie would be divided between its two sides.
    limit = torch.where(a > 0, torch.full_like(a, 1 + clip), torch.full_like(a, 1 - clip))
    beyond = a * (ratio.detach() - limit) > 0
    return -(a * torch.where(beyond, limit, ratio)).mean()


def step_kl(mean: Tensor, mean_base: Tensor, std: Tensor) -> Tensor:
    """``KL(N(mean, std^2) || N(mean_base, std^2)) = (mean - mean_base)^2 / (2 std^2)``, averaged over elements.

    Args:
        mean: Of the trained step, ``[B, ...]``, with gradient.
        mean_base: Of the same step by the base, ``[B, ...]``; detached here.
        std: Of both, ``[B]``, above 0.

    Returns:
        ``[B]``; averaged over elements like the log-probabilities, not summed.
    """
    return ((mean - mean_base.detach()).square() / (2 * per_sample(std, mean).square())).flatten(1).mean(1)
