"""Positive and negative policies, and the signed weight that equals them at ``v = v_old``."""

import pytest
import torch
from torch import Tensor

from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.objectives.policy import (
    gradient_weight,
    mean_absolute_error,
    nft_loss,
    optimality,
    policy_loss,
    policy_pair,
)
from gdmd_lightning.schedules import x0_from_velocity

BATCH, GROUP = 3, 4
BETAS = (0.1, 0.5, 1.0, 2.0)
SHAPE = (BATCH, 2, 3, 3)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets() -> tuple[Tensor, Tensor, Tensor]:
    """Targets ``[B * M, ...]``, optimalities and normalizers ``[B * M]``."""
    count = BATCH * GROUP
    return random(count, *SHAPE[1:], seed=1), random(count, seed=2).sigmoid(), 0.5 + random(count, seed=3).abs()


def policy_at_old(x: Tensor, y: Tensor, o: Tensor, n: Tensor, beta: float) -> Tensor:
    plus, minus = policy_pair(x, x.detach().clone(), beta)
    return policy_loss(plus, minus, y, o, n, n, beta)


@pytest.mark.parametrize("beta", BETAS)
def test_policy_loss_gradient_at_the_old_policy_is_signed_distillation_for_any_beta(beta: float) -> None:
    y, o, n = targets()
    x = random(*y.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(policy_at_old(x, y, o, n, beta), x)
    sign, n = (2 * o - 1).view(-1, 1, 1, 1), n.view(-1, 1, 1, 1)
    torch.testing.assert_close(gradient * x.numel(), 2 * sign * (x.detach() - y) / n, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0, 4.0])
def test_gradient_weight_equals_the_full_form_at_the_old_policy(beta: float, strength: float) -> None:
    y, o, n = targets()
    x = random(*SHAPE).requires_grad_()
    each = x.repeat_interleave(GROUP, dim=0)
    full = dm_loss(each, y, n) + strength * policy_at_old(each, y, o, n, beta)
    weighted = dm_loss(each, y, n, gradient_weight(o, 2 * strength))
    torch.testing.assert_close(
        torch.autograd.grad(weighted, x, retain_graph=True)[0],
        torch.autograd.grad(full, x)[0],
        rtol=1e-10,
        atol=1e-14,
    )


def test_gradient_weight_error_is_proportional_to_the_distance_from_the_old_policy() -> None:
    y, o, n = targets()
    x = random(*y.shape).requires_grad_()

    def gap(distance: float) -> float:
        plus, minus = policy_pair(x, x.detach() + distance * random(*y.shape, seed=5), beta=1.0)
        full = dm_loss(x, y, n) + policy_loss(plus, minus, y, o, n, n, 1.0)
        weighted = dm_loss(x, y, n, gradient_weight(o, 2.0))
        return float((torch.autograd.grad(full, x)[0] - torch.autograd.grad(weighted, x)[0]).norm())

    assert gap(0.01) > 0
    assert gap(0.01) == pytest.approx(10 * gap(0.001), rel=1e-6)


def test_policy_loss_gradient_is_zero_at_optimality_one_half() -> None:
    y, _, n = targets()
    x = random(*y.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(policy_at_old(x, y, torch.full_like(n, 0.5), n, 1.0), x)
    assert gradient.abs().max() == 0


def test_policy_loss_moves_toward_good_targets_and_away_from_bad_ones() -> None:
    y, _, n = targets()
    x = random(*y.shape).requires_grad_()
    for o, sign in ((1.0, -1), (0.0, 1)):
        (gradient,) = torch.autograd.grad(policy_at_old(x, y, torch.full_like(n, o), n, 1.0), x)
        moved = (x.detach() - 1e-3 * gradient - y).norm() - (x.detach() - y).norm()
        assert torch.sign(moved) == sign


def test_policy_loss_passes_no_gradient_to_the_old_policy_or_the_target() -> None:
    y, o, n = targets()
    v, v_old, target = random(*y.shape).requires_grad_(), random(*y.shape).requires_grad_(), y.requires_grad_()
    plus, minus = policy_pair(v, v_old, 0.5)
    policy_loss(plus, minus, target, o, n, n, 0.5).backward()
    assert v.grad is not None
    assert v_old.grad is None
    assert target.grad is None


@pytest.mark.parametrize("beta", BETAS)
def test_policy_pair_is_symmetric_around_the_old_policy(beta: float) -> None:
    v, v_old = random(*SHAPE), random(*SHAPE, seed=1)
    plus, minus = policy_pair(v, v_old, beta)
    torch.testing.assert_close((plus + minus) / 2, v_old)
    torch.testing.assert_close((plus - minus) / 2, beta * (v - v_old))


def test_policy_pair_at_beta_one_has_the_policy_as_its_positive_side() -> None:
    v, v_old = random(*SHAPE), random(*SHAPE, seed=1)
    torch.testing.assert_close(policy_pair(v, v_old, 1.0)[0], v)


def test_policy_pair_at_the_old_policy_is_twice_the_policy() -> None:
    v = random(*SHAPE)
    for side in policy_pair(v, v.clone(), 0.3):
        torch.testing.assert_close(side, v)


def test_policy_pair_of_velocities_agrees_with_that_of_x0() -> None:
    x_sigma, v, v_old = random(*SHAPE), random(*SHAPE, seed=1), random(*SHAPE, seed=2)
    sigma = torch.tensor([0.2, 0.6, 1.0], dtype=torch.float64)
    of_x0 = policy_pair(x0_from_velocity(x_sigma, v, sigma), x0_from_velocity(x_sigma, v_old, sigma), 0.7)
    for side, x0 in zip(policy_pair(v, v_old, 0.7), of_x0):
        torch.testing.assert_close(x0_from_velocity(x_sigma, side, sigma), x0)


def test_optimality_is_one_half_at_zero_advantage_and_stays_in_the_unit_interval() -> None:
    advantage = torch.tensor([-9.0, -2.0, -1.0, 0.0, 1.0, 2.0, 9.0], dtype=torch.float64)
    expected = torch.tensor([0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0], dtype=torch.float64)
    assert torch.equal(optimality(advantage, clip=2.0), expected)


def test_gradient_weight_is_exactly_one_at_zero_advantage() -> None:
    o = optimality(torch.zeros(4, dtype=torch.float64), clip=3.0)
    assert torch.equal(gradient_weight(o, 7.0), torch.ones(4, dtype=torch.float64))


def test_gradient_weight_of_opposite_advantages_averages_one() -> None:
    advantage = random(50)
    weight = gradient_weight(optimality(advantage), 2.0) + gradient_weight(optimality(-advantage), 2.0)
    torch.testing.assert_close(weight / 2, torch.ones(50, dtype=torch.float64))


def test_gradient_weight_is_negative_only_above_strength_one() -> None:
    o = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert (gradient_weight(o, 1.0) >= 0).all()
    assert (gradient_weight(o, 1.5) < 0).any()


# DiffusionNFT's loss on samples.


def nft_arguments(o: float = 0.7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *(random(*SHAPE, seed=seed) for seed in (1, 2, 3)), torch.full((BATCH,), o, dtype=torch.float64)


@pytest.mark.parametrize(("beta", "advantage_clip"), [(1.0, 5.0), (0.1, 2.0)])
def test_nft_loss_divides_each_squared_error_by_its_own_size(beta: float, advantage_clip: float) -> None:
    plus, minus, x0, o = nft_arguments()
    expected = 0.0
    for i in range(BATCH):
        toward, away = (plus[i] - x0[i]).flatten(), (minus[i] - x0[i]).flatten()
        expected += 0.7 * (toward @ toward) / toward.abs().sum() + 0.3 * (away @ away) / away.abs().sum()
    torch.testing.assert_close(nft_loss(plus, minus, x0, o, beta, advantage_clip), advantage_clip * expected / beta / 3)


def test_nft_loss_does_not_differentiate_the_sizes() -> None:
    plus, minus, x0, o = nft_arguments(1.0)
    (gradient,) = torch.autograd.grad(nft_loss(plus.requires_grad_(), minus, x0, o, 1.0, 1.0), plus)
    size = (plus.detach() - x0).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gradient, 2 * (plus.detach() - x0) / size / plus.numel())


def test_mean_absolute_error_is_double_and_floored() -> None:
    x = torch.zeros(2, 2, 3, 3)
    y = x.clone()
    y[1] = 1e-4
    found = mean_absolute_error(x, y)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.tensor([1e-5, 1e-4], dtype=torch.float64), rtol=1e-6, atol=0)


def test_nft_loss_of_a_perfect_prediction_is_zero_not_nan() -> None:
    _, _, x0, o = nft_arguments()
    assert nft_loss(x0, x0, x0, o, 1.0, 5.0) == 0
