"""Distribution matching: the loss exists for its gradient, so the tests check gradients."""

import pytest
import torch
from torch import Tensor

from gdmd_lightning.objectives.distribution_matching import dm_direction, dm_loss, normalizer

SHAPE = (5, 3, 4, 2)


def triple() -> tuple[Tensor, Tensor, Tensor]:
    """A student sample with gradient, and the ``x0`` of teacher and fake score for it."""
    x, real, fake = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x.requires_grad_(), real, fake


def gradient(x: Tensor, loss: Tensor) -> Tensor:
    return torch.autograd.grad(loss, x)[0]


def per_sample(n: Tensor) -> Tensor:
    return n.view(-1, 1, 1, 1)


def test_dm_loss_gradient_is_the_normalized_direction_over_the_number_of_elements() -> None:
    x, real, fake = triple()
    n = normalizer(x, real)
    loss = dm_loss(x, x - dm_direction(real, fake), n)
    torch.testing.assert_close(gradient(x, loss), (fake - real) / per_sample(n) / x.numel(), rtol=1e-12, atol=0)


def test_dm_loss_is_exactly_zero_if_teacher_and_fake_score_agree() -> None:
    x, real, _ = triple()
    loss = dm_loss(x, x - dm_direction(real, real), normalizer(x, real))
    assert loss.item() == 0
    assert torch.equal(gradient(x, loss), torch.zeros(SHAPE, dtype=torch.float64))


def test_dm_loss_passes_no_gradient_to_target_direction_or_normalizer() -> None:
    x, real, fake = (t.detach().requires_grad_() for t in triple())
    direction, n = dm_direction(real, fake), normalizer(x, real)
    assert not direction.requires_grad
    assert not n.requires_grad
    target = (x * 2).detach().requires_grad_()
    dm_loss(x, target, n).backward()
    assert target.grad is None


def test_dm_loss_weight_scales_and_reverses_each_gradient() -> None:
    x, real, fake = triple()
    n, y = normalizer(x, real), x - dm_direction(real, fake)
    weight = torch.tensor([1.0, 2.0, 0.0, -1.0, -0.5], dtype=torch.float64)
    plain = gradient(x, dm_loss(x, y, n))
    torch.testing.assert_close(gradient(x, dm_loss(x, y, n, weight)), per_sample(weight) * plain, rtol=1e-12, atol=0)


def test_dm_loss_descent_moves_a_sample_to_its_target() -> None:
    x, real, fake = triple()
    n, y = normalizer(x, real), (x - dm_direction(real, fake)).detach()
    step = gradient(x, dm_loss(x, y, n)) * x.numel() * per_sample(n)
    torch.testing.assert_close(x.detach() - step, y)


def test_dm_direction_shifts_the_target_from_fake_to_real() -> None:
    x, real, fake = triple()
    torch.testing.assert_close(x - dm_direction(real, fake), x + real - fake)


def test_normalizer_is_the_mean_distance_of_each_sample_from_the_teachers_x0() -> None:
    x, real, _ = triple()
    expected = torch.stack([(a - b).abs().mean() for a, b in zip(x.detach(), real)])
    torch.testing.assert_close(normalizer(x, real), expected)


def test_normalizer_stops_at_its_floor() -> None:
    x, _, _ = triple()
    assert torch.equal(normalizer(x, x.detach(), floor=0.25), torch.full((SHAPE[0],), 0.25, dtype=torch.float64))


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_dm_loss_gradient_does_not_depend_on_the_scale_of_latents(scale: float) -> None:
    x, real, fake = triple()
    big, big_real, big_fake = (x.detach() * scale).requires_grad_(), real * scale, fake * scale
    g = gradient(x, dm_loss(x, x - dm_direction(real, fake), normalizer(x, real)))
    big_g = gradient(big, dm_loss(big, big - dm_direction(big_real, big_fake), normalizer(big, big_real)))
    torch.testing.assert_close(big_g, g)
