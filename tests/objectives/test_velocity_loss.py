"""Flow matching is minimal at the posterior mean of ``eps - x0``, so the fake score learns that."""

import torch
from gaussian_world import Gaussian
from torch import Tensor

from gdmd_lightning.objectives.score_matching import velocity_loss
from gdmd_lightning.schedules import renoise

DATA = Gaussian(
    torch.tensor([0.7, -0.2], dtype=torch.float64), torch.tensor([[1.5, -0.4], [-0.4, 0.5]], dtype=torch.float64)
)


def exact_pairs(count: int = 64) -> tuple[Tensor, Tensor]:
    """``x0`` and ``eps`` with exactly the mean and covariance of their distributions, without sampling error."""
    z = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T @ z / count), z.T, upper=False).T
    return DATA.mean + z[:, :2] @ torch.linalg.cholesky(DATA.covariance).T, z[:, 2:]


def best_linear(t: float) -> tuple[Tensor, Tensor]:
    """``E[eps - x0 | x_t] = x_t @ slope + offset``."""
    zero, unit = torch.zeros(1, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    offset = DATA.velocity(zero, torch.full((1,), t, dtype=torch.float64))
    return DATA.velocity(unit, torch.full((2,), t, dtype=torch.float64)) - offset, offset


def loss_of(slope: Tensor, offset: Tensor, t: float) -> Tensor:
    x0, eps = exact_pairs()
    return velocity_loss(renoise(x0, torch.full((len(x0),), t, dtype=x0.dtype), eps) @ slope + offset, x0, eps)


def test_velocity_loss_is_stationary_at_the_posterior_mean() -> None:
    for t in (0.05, 0.3, 0.7, 1.0):
        slope, offset = (p.requires_grad_() for p in best_linear(t))
        for gradient in torch.autograd.grad(loss_of(slope, offset, t), (slope, offset)):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_velocity_loss_is_larger_for_every_other_linear_network() -> None:
    slope, offset = best_linear(0.4)
    best = loss_of(slope, offset, 0.4)
    for seed in range(20):
        stream = torch.Generator().manual_seed(seed)
        d_slope = 0.1 * torch.randn(2, 2, generator=stream, dtype=torch.float64)
        d_offset = 0.1 * torch.randn(1, 2, generator=stream, dtype=torch.float64)
        assert loss_of(slope + d_slope, offset + d_offset, 0.4) > best


def test_velocity_loss_of_the_true_velocity_is_zero() -> None:
    x0, eps = exact_pairs()
    assert velocity_loss(eps - x0, x0, eps) == 0
