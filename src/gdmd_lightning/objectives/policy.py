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


def mean_absolute_error(x: Tensor, y: Tensor, floor: float = 1e-5) -> Tensor:
    """``mean_{C,H,W} |x - y|`` per sample, ``[B, ...]`` to ``[B]``: in double precision, without gradient.

    It is at least ``floor``.

    Source: DiffusionNFT's code, which divides each squared error by it.
    """
    return (x.detach().double() - y.detach().double()).abs().flatten(1).mean(1).clamp(min=floor)


def nft_loss(plus: Tensor, minus: Tensor, x0: Tensor, o: Tensor, beta: float, advantage_clip: float) -> Tensor:
    """``A_max mean_B [ o E+ + (1 - o) E- ] / b`` with ``E = mean (x - x0)^2 / sg(mean |x - x0|)`` for each policy.

    Args:
        plus, minus: ``x0`` of the two policies, ``[B, C, H, W]``.
        x0: Judged samples, ``[B, C, H, W]``; detached here.
        o: Optimality, ``[B]`` in [0, 1].
        beta: Strength of the mixture, above 0.
        advantage_clip: ``A_max``, above 0.

    Source: DiffusionNFT (2509.16117), Eq. 5, with the self-normalization of its section 3.3.
    """
    sizes = (mean_absolute_error(plus, x0), mean_absolute_error(minus, x0))
    return advantage_clip * policy_loss(plus, minus, x0, o, *sizes, beta)


def gradient_weight(o: Tensor, strength: float) -> Tensor:
    """``w = 1 + strength (2 o - 1)``, the signed weight of one distillation gradient.

    The full form's gradient at ``v = v_old``, ``2 lambda (2 o - 1) (x - y) / n``, added to that of
    distillation, ``(x - y) / n``, gives this weight with ``strength = 2 lambda``.
    """
    return 1 + strength * (2 * o - 1)
