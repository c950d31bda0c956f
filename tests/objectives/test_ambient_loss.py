"""A network that learns from samples at level ``s`` learns the velocity of clean data; the consistency estimator."""

import pytest
import torch
from gaussian_world import Gaussian
from torch import Tensor

from gdmd_lightning.objectives.ambient import ambient_coefficients, ambient_loss, ambient_renoise, consistency_loss
from gdmd_lightning.objectives.score_matching import velocity_loss
from gdmd_lightning.schedules import renoise

F64 = torch.float64
DATA = Gaussian(torch.tensor([0.7, -0.2], dtype=F64), torch.tensor([[1.5, -0.4], [-0.4, 0.5]], dtype=F64))
LEVELS = [(0.0, 0.3), (0.2, 0.5), (0.25, 0.26), (0.5, 1.0), (0.75, 0.9)]


def exact_draws(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    """``x0`` and two noises with exactly the mean and covariance of their distributions, without sampling error."""
    z = torch.randn(count, 6, generator=torch.Generator().manual_seed(0), dtype=F64)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / count), z.T, upper=False).T
    return DATA.mean + z[:, :2] @ torch.linalg.cholesky(DATA.covariance).T, z[:, 2:4], z[:, 4:]


def level(value: float, count: int = 64) -> Tensor:
    return torch.full((count,), value, dtype=F64)


def loss_of(slope: Tensor, offset: Tensor, s: float, t: float) -> Tensor:
    x0, first, eps = exact_draws()
    x_s = renoise(x0, level(s), first)
    x_t = ambient_renoise(x_s, level(s), level(t), eps)
    return ambient_loss(x_t @ slope + offset, x_s, level(s), level(t), eps, largest_weight=10.0)


@pytest.mark.parametrize(("s", "t"), LEVELS)
def test_minimizer_is_the_velocity_of_clean_data(s, t):
    zero, unit = torch.zeros(1, 2, dtype=F64), torch.eye(2, dtype=F64)
    offset = DATA.velocity(zero, level(t, 1))
    slope = DATA.velocity(unit, level(t, 2)) - offset
    slope, offset = slope.requires_grad_(), offset.requires_grad_()
    for gradient in torch.autograd.grad(loss_of(slope, offset, s, t), (slope, offset)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("s", "t"), LEVELS)
def test_samples_noised_from_s_have_the_marginal_of_t(s, t):
    x0, first, eps = exact_draws()
    x_t = ambient_renoise(renoise(x0, level(s), first), level(s), level(t), eps)
    torch.testing.assert_close(x_t.mean(0), (1 - t) * DATA.mean)
    expected = (1 - t) ** 2 * DATA.covariance + t**2 * torch.eye(2, dtype=F64)
    centered = x_t - x_t.mean(0)
    torch.testing.assert_close(centered.T @ centered / len(x_t), expected)


def test_clean_samples_give_the_velocity_loss_weighted_by_the_level():
    x0, v, eps = exact_draws()
    for t, weight in ((0.9, 1.0), (0.5, 1.0), (0.1, 10 * 0.1**2)):
        found = ambient_loss(v, x0, level(0.0), level(t), eps, largest_weight=10.0)
        torch.testing.assert_close(found, weight * velocity_loss(v, x0, eps))


def test_loss_is_finite_where_the_level_is_the_start_of_the_interval():
    x_s, v, eps = exact_draws()
    _, q = ambient_coefficients(level(0.5), level(0.5))
    assert float(q.max()) == 0
    assert ambient_loss(v, x_s, level(0.5), level(0.5), eps, largest_weight=10.0).isfinite()


def test_weight_is_that_of_the_unscaled_loss_up_to_its_limit():
    """``w q^2`` multiplies ``|v - u|^2``: 1 where ``1 / q^2`` is below the limit, ``10 q^2`` where it is not."""
    x_s, v, eps = exact_draws()
    for s, t in ((0.2, 0.9), (0.5, 0.52)):
        a, q = ((1 - t) / (1 - s)), (t**2 - ((1 - t) / (1 - s)) ** 2 * s**2) ** 0.5
        assert (q**2 < 0.1) == (t < 0.6)
        u = -x_s / (1 - s) + (t + a * s**2 / (1 - s)) / q * eps
        expected = min(1.0, 10 * q**2) * (v - u).square().mean()
        torch.testing.assert_close(ambient_loss(v, x_s, level(s), level(t), eps, largest_weight=10.0), expected)


def test_consistency_estimator_is_unbiased():
    """Over independent draws of ``h' = m + b z`` it averages to ``(m - h)^2``, without the variance of ``h'``."""
    h, m, b = (torch.randn(3, 2, generator=torch.Generator().manual_seed(k), dtype=F64) for k in range(3))
    draws = [m + sign * b for sign in (1.0, -1.0)]
    mean = torch.stack([consistency_loss(h, one, other) for one in draws for other in draws]).mean()
    torch.testing.assert_close(mean, (m - h).square().mean())
    same = torch.stack([consistency_loss(h, one, one) for one in draws]).mean()
    torch.testing.assert_close(same, ((m - h).square() + b.square()).mean())
