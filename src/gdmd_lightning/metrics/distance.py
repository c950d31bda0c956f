"""Distances between two distributions, of which samples are given."""

from __future__ import annotations

import torch
from torch import Tensor


def total_variation(one: Tensor, other: Tensor) -> Tensor:
    """Total variation distance between the shares of two sets of counts, in [0, 1].

    It is above 0 even for equal distributions, as far as there are finitely many counts. If one has counted nothing, it
    is 1.

    Args:
        one: Counts ``[..., N, C]``, summed over ``N``.
        other: Counts ``[..., M, C]``.

    Returns:
        ``[...]``.
    """
    sums = [counts.double().sum(-2) for counts in (one, other)]
    shares = [each / each.sum(-1, keepdim=True).clamp(min=1e-300) for each in sums]
    distance = (shares[0] - shares[1]).abs().sum(-1) / 2
    empty = (sums[0].sum(-1) == 0) | (sums[1].sum(-1) == 0)
    return torch.where(empty, 1.0, distance)


def frechet_distance(one: Tensor, other: Tensor) -> Tensor:
    """Squared Frechet distance between the Gaussians with the means and covariances of two sets of vectors.

    ``|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2))``; 0 for the same vectors. It is above 0 even for equal distributions,
    as far as there are finitely many vectors.

    Args:
        one: ``[N, D]``, ``N`` at least 2.
        other: ``[M, D]``, ``M`` at least 2.

    Returns:
        A scalar, in float64.

    Raises:
        ValueError: If a set has fewer than 2 vectors.

    Source: GANs Trained by a Two Time-Scale Update Rule (1706.08500), Eq. 6.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError("covariances need at least 2 vectors")
    one, other = one.double(), other.double()
    c1, c2 = (torch.cov(each.T).reshape(each.shape[1], -1) for each in (one, other))
    root = _root(c1)
    # C1 C2 has the eigenvalues of the symmetric matrix C1^(1/2) C2 C1^(1/2).
    product = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    distance = (one.mean(0) - other.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * product
    return distance.clamp(min=0)


def _root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric matrix without negative eigenvalues."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T
