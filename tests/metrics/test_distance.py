"""Distances between distributions: identities, and values in closed form."""

import pytest
import torch

from gdmd_lightning.metrics.distance import frechet_distance, total_variation


def normal(mean, root, count: int = 4000):
    """Vectors whose mean and covariance are exactly ``mean`` and ``root @ root.T``."""
    x = torch.randn(count, len(mean), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    whitened = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T
    return whitened @ root.T + mean


def test_frechet_distance_of_the_same_vectors_is_zero():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    assert float(frechet_distance(x, x)) == pytest.approx(0, abs=1e-10)
    assert float(frechet_distance(x, x.flip(0))) == pytest.approx(0, abs=1e-10)
    few = x[:3]  # a covariance of a lower rank
    assert float(frechet_distance(few, few)) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    one = normal(torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([1.0, 3.0])).double())
    two = normal(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([2.0, 0.5])).double())
    # |m|^2 + sum of (s1 - s2)^2
    assert float(frechet_distance(one, two)) == pytest.approx(1 + 4 + 1 + 2.5**2, rel=1e-9)
    assert float(frechet_distance(two, one)) == pytest.approx(12.25, rel=1e-9)


def test_frechet_distance_of_gaussians_whose_covariances_do_not_commute():
    a = torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2.0], [0.0, 1.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    c1, c2 = a @ a.T, b @ b.T
    # tr of the root of a 2x2 matrix with positive eigenvalues: sqrt(tr + 2 sqrt(det))
    product = c1 @ c2
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = float(c1.trace() + c2.trace() - 2 * root)
    assert expected > 0.1
    assert float(frechet_distance(normal(zero, a), normal(zero, b))) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_needs_two_vectors():
    with pytest.raises(ValueError, match="at least 2 vectors"):
        frechet_distance(torch.zeros(1, 2), torch.zeros(5, 2))


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([[1, 1], [0, 2]], [[10, 30]], 0),
        ([[4, 0]], [[0, 1]], 1),
        ([[3, 1]], [[1, 1]], 0.25),
        ([[1, 1, 1, 1]], [[8, 0, 0, 0]], 0.75),
        ([[0, 0]], [[1, 1]], 1),
        ([[1, 1]], [[0, 0]], 1),
    ],
)
def test_total_variation_compares_shares(one, other, expected):
    one, other = torch.tensor(one), torch.tensor(other)
    assert float(total_variation(one, other)) == pytest.approx(expected)
    assert total_variation(one.expand(3, *one.shape), other).tolist() == pytest.approx([expected] * 3)
