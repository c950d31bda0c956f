"""Positive and negative velocity policies, and the gradient weight that equals them to first order.

Source: DiffusionNFT (2509.16117), section 3; used on implicit targets by GDMD (2604.19009).
"""

from __future__ import annotations

from torch import Tensor


def optimality(advantage: Tensor, clip: float = 1.0) -> Tensor:
    """``o = 1/2 + clip(A, -A_max, A_max) / (2 A_max)`` in [0, 1]: 1 means move toward the target, 0 away."""
    return 0.5 + advantage.clamp(-clip, clip) / (2 * clip)


def policy_pair(v: Tensor, v_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """``v+ = (1 - b) v_old + b v`` and ``v- = (1 + b) v_old - b v``; only ``v`` carries gradient.

    The factors sum to 1, so the same formulas hold for ``x0`` at the same input.
    """
    v_old = v_old.detach()
    return (1 - beta) * v_old + beta * v, (1 + beta) * v_old - beta * v


def policy_loss(
    plus: Tensor, minus: Tensor, target: Tensor, o: Tensor, n_plus: Tensor, n_minus: Tensor, beta: float
) -> Tensor:
    """``mean_B [ o |x+ - y|^2 / n+ + (1 - o) |x- - y|^2 / n- ] / b``, squares averaged over ``C, H, W``.

    At ``x = x_old = x+ = x-`` and with one ``n`` its gradient in ``x`` is ``2 (2 o - 1) (x - y) / n`` before the mean.

    Args:
        plus, minus: ``x0`` of the two policies, ``[B, C, H, W]``.
        target: Judged targets, ``[B, C, H, W]``; detached here.
        o: Optimality, ``[B]`` in [0, 1].
        n_plus, n_minus: Normalizers, ``[B]``; distillation's ``n`` for both, or the size of each error.
        beta: Strength of the mixture, above 0.
    """
    y = target.detach()
    toward = (plus - y).square().flatten(1).mean(1)
    away = (minus - y).square().flatten(1).mean(1)
    return ((o * toward / n_plus + (1 - o) * away / n_minus) / beta).mean()


def gradient_weight(o: Tensor, strength: float) -> Tensor:
    """``w = 1 + strength (2 o - 1)``, the signed weight of one distillation gradient.

    The full form's gradient at ``v = v_old``, ``2 lambda (2 o - 1) (x - y) / n``, added to that of
    distillation, ``(x - y) / n``, gives this weight with ``strength = 2 lambda``.
    """
    return 1 + strength * (2 * o - 1)
