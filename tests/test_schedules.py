"""One noise level for every family: flow and variance-preserving form agree."""

import math

import pytest
import torch
from torch import Tensor

from gdmd_lightning.objectives.distribution_matching import dm_direction, dm_loss, normalizer
from gdmd_lightning.schedules import (
    LogitNormal,
    RenoiseDistribution,
    Uniform,
    draw_renoise_sigmas,
    few_step_sigmas,
    renoise,
    shift_sigma,
    sigma_from_vp,
    velocity_from_x0,
    vp_from_sigma,
    x0_from_velocity,
)

F64 = torch.float64
SIGMA = torch.tensor([0.05, 0.3, 0.5, 0.8, 0.98], dtype=F64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def column(level: Tensor) -> Tensor:
    return level.view(-1, 1, 1, 1)


X0, EPS = random(5, 2, 3, 3), random(5, 2, 3, 3, seed=1)


def test_x0_from_velocity_inverts_renoise() -> None:
    torch.testing.assert_close(x0_from_velocity(renoise(X0, SIGMA, EPS), EPS - X0, SIGMA), X0)


def test_velocity_from_x0_inverts_x0_from_velocity() -> None:
    x, prediction = random(5, 2, 3, 3, seed=2), random(5, 2, 3, 3, seed=3)
    torch.testing.assert_close(x0_from_velocity(x, velocity_from_x0(x, prediction, SIGMA), SIGMA), prediction)


def test_renoise_goes_from_data_to_pure_noise() -> None:
    assert torch.equal(renoise(X0, torch.zeros(5, dtype=F64), EPS), X0)
    assert torch.equal(renoise(X0, torch.ones(5, dtype=F64), EPS), EPS)


def test_sigma_from_vp_inverts_vp_from_sigma() -> None:
    torch.testing.assert_close(sigma_from_vp(*vp_from_sigma(SIGMA)), SIGMA)
    angle = torch.linspace(0, math.pi / 2, 9, dtype=F64)
    for there, back in zip((angle.cos(), angle.sin()), vp_from_sigma(sigma_from_vp(angle.cos(), angle.sin()))):
        torch.testing.assert_close(back, there)


def test_vp_from_sigma_preserves_variance() -> None:
    alpha, noise = vp_from_sigma(SIGMA)
    torch.testing.assert_close(alpha**2 + noise**2, torch.ones_like(SIGMA))


def vp_network(x_t: Tensor, alpha: Tensor) -> Tensor:
    """Any network that predicts ``eps`` from a variance preserving state."""
    return torch.tanh(1.3 * x_t + 0.2 * x_t.flip(1)) * (1 + column(alpha))


def as_flow(x_sigma: Tensor, sigma: Tensor) -> Tensor:
    """The same network as a velocity of a rectified flow, as a family of the SDXL kind uses it."""
    alpha, noise = (column(level) for level in vp_from_sigma(sigma))
    x_t = x_sigma * (alpha + noise)
    eps = vp_network(x_t, vp_from_sigma(sigma)[0])
    return eps - (x_t - noise * eps) / alpha


def vp_x0(x_t: Tensor, sigma: Tensor) -> Tensor:
    alpha, noise = vp_from_sigma(sigma)
    return (x_t - column(noise) * vp_network(x_t, alpha)) / column(alpha)


def vp_renoise(x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    alpha, noise = (column(level) for level in vp_from_sigma(sigma))
    return alpha * x0 + noise * eps


def test_flow_and_vp_states_differ_by_a_factor() -> None:
    alpha, noise = vp_from_sigma(SIGMA)
    torch.testing.assert_close(vp_renoise(X0, SIGMA, EPS) / column(alpha + noise), renoise(X0, SIGMA, EPS))


def test_one_network_in_both_forms_sees_the_same_x0() -> None:
    x_sigma = renoise(X0, SIGMA, EPS)
    flow = x0_from_velocity(x_sigma, as_flow(x_sigma, SIGMA), SIGMA)
    torch.testing.assert_close(flow, vp_x0(vp_renoise(X0, SIGMA, EPS), SIGMA))


def test_one_network_in_both_forms_gives_the_same_distillation_gradient() -> None:
    x_sigma, x_t = renoise(X0, SIGMA, EPS), vp_renoise(X0, SIGMA, EPS)
    fake = random(*X0.shape, seed=4)
    gradients = []
    for real in (x0_from_velocity(x_sigma, as_flow(x_sigma, SIGMA), SIGMA), vp_x0(x_t, SIGMA)):
        x = X0.clone().requires_grad_()
        loss = dm_loss(x, x - dm_direction(real, fake), normalizer(x, real))
        gradients += torch.autograd.grad(loss, x)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_sigma_keeps_the_ends(shift: float) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=F64)
    assert torch.equal(shift_sigma(ends, shift), ends)


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_shift_sigma_is_undone_by_its_inverse(shift: float) -> None:
    torch.testing.assert_close(shift_sigma(shift_sigma(SIGMA, shift), 1 / shift), SIGMA)


def test_shift_sigma_above_one_moves_toward_noise_in_order() -> None:
    shifted = shift_sigma(SIGMA, 3.0)
    assert (shifted > SIGMA).all()
    assert (shifted.diff() > 0).all()


def test_shift_sigma_multiplies_the_ratio_of_noise_to_data() -> None:
    shifted = shift_sigma(SIGMA, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * SIGMA / (1 - SIGMA))


def test_few_step_sigmas_of_four_steps_are_dmd2s() -> None:
    assert few_step_sigmas(4).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_few_step_sigmas_fall_from_one_to_zero(steps: int, shift: float) -> None:
    sigmas = few_step_sigmas(steps, shift)
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


DISTRIBUTIONS = [Uniform(), Uniform(0.1, 0.7, shift=3.0), LogitNormal(), LogitNormal(0.5, 0.8, shift=2.0)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
def test_quantiles_rise_within_the_open_interval(distribution: RenoiseDistribution) -> None:
    levels = distribution.quantile(torch.linspace(0, 1, 201))
    assert (levels.diff() >= 0).all()
    assert levels[0] > 0
    assert levels[-1] < 1


def test_logit_normal_median_is_the_sigmoid_of_its_mean() -> None:
    assert LogitNormal(0.7, 2.0).quantile(torch.tensor([0.5])) == pytest.approx(1 / (1 + math.exp(-0.7)), rel=1e-6)


def test_logit_normal_quantiles_are_those_of_the_normal() -> None:
    one_sigma = torch.special.ndtr(torch.tensor([-1.0, 1.0], dtype=F64))
    expected = torch.sigmoid(torch.tensor([0.3 - 0.8, 0.3 + 0.8], dtype=F64))
    torch.testing.assert_close(LogitNormal(0.3, 0.8).quantile(one_sigma), expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=repr)
@pytest.mark.parametrize("group", [1, 2, 4])
def test_draw_renoise_sigmas_puts_each_level_into_its_stratum(distribution: RenoiseDistribution, group: int) -> None:
    levels = draw_renoise_sigmas(distribution, 500, group, torch.Generator().manual_seed(0))
    edges = distribution.quantile(torch.arange(group + 1) / group)
    assert levels.shape == (500, group)
    assert (levels >= edges[:-1] - 1e-6).all()
    assert (levels <= edges[1:] + 1e-6).all()


def distance_from(distribution: RenoiseDistribution, levels: Tensor) -> float:
    """Kolmogorov's distance between drawn levels and a distribution without atoms."""
    count = levels.numel()
    ranks = torch.arange(1, count + 1) / count
    grid = distribution.quantile(torch.linspace(0, 1, 4001))
    share = torch.searchsorted(levels.flatten().sort().values, grid, right=True) / count
    return float((share - torch.linspace(0, 1, 4001)).abs().max()) + float(ranks[0])


@pytest.mark.parametrize("stratify", [True, False])
def test_draw_renoise_sigmas_follows_the_distribution_stratified_or_not(stratify: bool) -> None:
    distribution = Uniform(0.1, 0.9, shift=3.0)
    levels = draw_renoise_sigmas(distribution, 5000, 4, torch.Generator().manual_seed(0), stratify=stratify)
    assert distance_from(distribution, levels) < 1.63 / math.sqrt(levels.numel())  # 1 % level


def test_one_stratum_alone_does_not_follow_the_distribution() -> None:
    distribution = Uniform()
    first = draw_renoise_sigmas(distribution, 5000, 4, torch.Generator().manual_seed(0))[:, 0]
    assert distance_from(distribution, first) > 0.7


def test_stratified_group_spans_the_distribution_more_evenly() -> None:
    means = [
        draw_renoise_sigmas(Uniform(), 2000, 4, torch.Generator().manual_seed(0), stratify=stratify).mean(1).var()
        for stratify in (True, False)
    ]
    assert means[0] < means[1] / 10


def test_draw_renoise_sigmas_is_a_function_of_its_stream() -> None:
    one, same, other = (draw_renoise_sigmas(Uniform(), 3, 4, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
