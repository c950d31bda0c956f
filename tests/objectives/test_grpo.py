"""The clipped ratio and the step's KL divergence: values and gradients at, inside and beyond the clip."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from gdmd_lightning.objectives.grpo import clipped_ratio_loss, policy_ratio, step_kl

F64 = torch.float64


def slope(ratio: float, advantage: float, clip: float = 0.1, advantage_clip: float = 5.0) -> float:
    """Gradient of the loss of one sample in its ratio."""
    r = torch.tensor([ratio], dtype=F64, requires_grad=True)
    loss = clipped_ratio_loss(r, torch.tensor([advantage], dtype=F64), clip, advantage_clip)
    return float(torch.autograd.grad(loss, r)[0])


@pytest.mark.parametrize("advantage", [2.0, -3.0])
@pytest.mark.parametrize("ratio", [0.95, 1.0, 1.05])
def test_ratio_inside_the_clip_gives_the_plain_policy_gradient(ratio: float, advantage: float) -> None:
    assert slope(ratio, advantage) == -advantage


@pytest.mark.parametrize(("ratio", "advantage"), [(1.2, 2.0), (0.8, -2.0)])
def test_ratio_that_moved_far_enough_gives_no_gradient(ratio: float, advantage: float) -> None:
    assert slope(ratio, advantage) == 0.0


@pytest.mark.parametrize(("ratio", "advantage"), [(0.8, 2.0), (1.2, -2.0)])
def test_ratio_that_moved_the_wrong_way_is_pulled_back(ratio: float, advantage: float) -> None:
    assert slope(ratio, advantage) == -advantage


@pytest.mark.parametrize(("ratio", "advantage"), [(1.125, 1.0), (0.875, -1.0)])
def test_ratio_exactly_at_the_clip_still_counts_as_inside(ratio: float, advantage: float) -> None:
    assert slope(ratio, advantage, clip=0.125) == -advantage
    further = ratio + 1e-9 * (1 if ratio > 1 else -1)
    assert slope(further, advantage, clip=0.125) == 0.0


def test_clipped_loss_is_the_mean_of_the_worse_of_both() -> None:
    ratio, a = torch.tensor([1.2, 0.8, 1.2, 0.8], dtype=F64), torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)
    expected = torch.tensor([-1.1, -0.8, 1.2, 0.9], dtype=F64).mean()
    torch.testing.assert_close(clipped_ratio_loss(ratio, a, 0.1, 5.0), expected)


def test_advantages_are_clipped_on_both_sides() -> None:
    assert slope(1.0, 7.0, advantage_clip=5.0) == -5.0
    assert slope(1.0, -7.0, advantage_clip=5.0) == 5.0
    assert slope(1.0, 4.5, advantage_clip=5.0) == -4.5


def test_clipped_loss_passes_no_gradient_to_advantages_or_the_old_policy() -> None:
    new, old, a = (torch.full((3,), value, dtype=F64, requires_grad=True) for value in (0.1, 0.1, 2.0))
    clipped_ratio_loss(policy_ratio(new, old), a, 0.1, 5.0).backward()
    torch.testing.assert_close(new.grad, torch.full((3,), -2.0 / 3, dtype=F64))
    assert old.grad is None
    assert a.grad is None


def test_policy_ratio_is_exactly_one_at_the_old_policy() -> None:
    log_prob = torch.randn(5, dtype=F64)
    assert torch.equal(policy_ratio(log_prob, log_prob.clone()), torch.ones(5, dtype=F64))


def kl_arguments() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    mean, base = (torch.randn(3, 2, 2, 3, generator=rng, dtype=F64) for _ in range(2))
    return mean, base, torch.tensor([0.3, 1.0, 2.0], dtype=F64)


def test_step_kl_is_that_of_two_normals_averaged_over_elements() -> None:
    mean, base, std = kl_arguments()
    each = std.view(-1, 1, 1, 1).expand_as(mean)
    expected = kl_divergence(Normal(mean, each), Normal(base, each)).flatten(1).mean(1)
    torch.testing.assert_close(step_kl(mean, base, std), expected)


def test_step_kl_is_zero_at_the_base_and_moves_only_the_trained_mean() -> None:
    mean, base, std = kl_arguments()
    assert torch.equal(step_kl(base, base, std), torch.zeros(3, dtype=F64))
    base.requires_grad_()
    step_kl(mean.requires_grad_(), base, std).sum().backward()
    torch.testing.assert_close(mean.grad, (mean - base).detach() / std.view(-1, 1, 1, 1) ** 2 / 12)
    assert base.grad is None
