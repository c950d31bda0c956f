"""Few-step samplers: how the kinds relate, what variance they keep, and what a rollout costs."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdmd_lightning.samplers import (
    FewStepSampler,
    Predict,
    Transition,
    backward_simulation,
    sample,
    step_cps,
    step_ode,
    step_renoise,
    step_sde,
)
from gdmd_lightning.schedules import few_step_sigmas, renoise

F64 = torch.float64
HERE, BELOW = torch.tensor([1.0, 0.75, 0.4], dtype=F64), torch.tensor([0.75, 0.3, 0.1], dtype=F64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


X, V, NOISE = (random(3, 2, 2, 2, seed=seed) for seed in range(3))

KINDS = [FewStepSampler(kind="ode"), FewStepSampler(kind="renoise"), FewStepSampler(kind="cps", eta=0.9)]
kinds = pytest.mark.parametrize("sampler", KINDS, ids=lambda sampler: sampler.kind)


# One step.


def test_cps_without_fresh_noise_is_euler() -> None:
    cps, ode = step_cps(X, V, HERE, BELOW, 0.0, NOISE), step_ode(X, V, HERE, BELOW)
    torch.testing.assert_close(cps.sample, ode.sample, rtol=1e-13, atol=1e-15)
    assert torch.equal(cps.std, torch.zeros_like(HERE))


def test_cps_with_fresh_noise_alone_is_renoising() -> None:
    cps, fresh = step_cps(X, V, HERE, BELOW, 1.0, NOISE), step_renoise(X, V, HERE, BELOW, NOISE)
    torch.testing.assert_close(cps.sample, fresh.sample, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(cps.std, fresh.std)


def every_step(noise: Tensor) -> list[Transition]:
    return [
        step_ode(X, V, HERE, BELOW),
        step_renoise(X, V, HERE, BELOW, noise),
        step_cps(X, V, HERE, BELOW, 0.9, noise),
        step_sde(X, V, HERE, BELOW, 0.7, 0.9, noise),
    ]


def test_a_sample_is_its_mean_and_std_times_noise() -> None:
    for step in every_step(NOISE):
        torch.testing.assert_close(step.sample, step.mean + step.std.view(-1, 1, 1, 1) * NOISE)


def test_mean_and_std_know_nothing_of_the_noise() -> None:
    for one, other in zip(every_step(NOISE), every_step(NOISE + 1)):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


@kinds
def test_the_last_step_is_the_predicted_x0_without_noise(sampler: FewStepSampler) -> None:
    last = sampler.step(X, V, HERE, torch.zeros_like(HERE), NOISE)
    torch.testing.assert_close(last.sample, X - HERE.view(-1, 1, 1, 1) * V)
    assert torch.equal(last.std, torch.zeros_like(HERE))


@kinds
def test_a_right_prediction_is_kept_on_the_line_from_data_to_noise(sampler: FewStepSampler) -> None:
    """With the pair's own velocity a step gives ``(1 - s') x0 + s' eps'``, with ``eps'`` as normal as ``eps``."""
    x0, eps = random(20000, 1, seed=3), random(20000, 1, seed=4)
    here, below = torch.full((20000,), 0.7, dtype=F64), torch.full((20000,), 0.4, dtype=F64)
    step = sampler.step(renoise(x0, here, eps), eps - x0, here, below, random(20000, 1, seed=5))
    fresh = (step.sample - 0.6 * x0) / 0.4
    assert fresh.mean() == pytest.approx(0, abs=0.03)
    assert fresh.var() == pytest.approx(1, abs=0.04)
    assert (fresh * x0).mean() == pytest.approx(0, abs=0.03)


# Gaussian data N(mu, s^2): a step with the exact velocity is affine, so its law needs no sampling.


def gaussian_velocity(mu: float, s: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``E[eps - x0 | x]`` under ``x = (1 - sigma) x0 + sigma eps``."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.view(-1, *[1] * (x.dim() - 1))
        white = (x - (1 - sigma) * mu) / marginal(sigma, s)
        return sigma * white - (mu + (1 - sigma) * s**2 * white)

    return velocity


def marginal(sigma: Tensor, s: float) -> Tensor:
    return (1 - sigma) ** 2 * s**2 + sigma**2


def variance_after(step: Callable[..., Transition], sigmas: Tensor, s: float) -> Tensor:
    """Variance after all steps, from the marginal one at ``sigmas[0]``: ``var' = slope^2 var + std^2``."""
    velocity, variance = gaussian_velocity(0.0, s), marginal(sigmas[:1], s)
    one = torch.ones(1, 1, dtype=F64)
    for here, below in zip(sigmas[:-1, None], sigmas[1:, None]):
        moved = step(one, velocity(one, here), here, below, torch.zeros_like(one))
        variance = moved.mean[0] ** 2 * variance + moved.std**2
    return variance


def sde(x: Tensor, v: Tensor, here: Tensor, below: Tensor, noise: Tensor) -> Transition:
    return step_sde(x, v, here, below, 0.7, 0.999, noise)


def error_at_the_end(step: Callable[..., Transition], count: int, s: float = 0.6) -> float:
    sigmas = torch.linspace(0.9, 0.1, count + 1, dtype=F64)
    return float((variance_after(step, sigmas, s) - marginal(sigmas[-1:], s)).abs())


@pytest.mark.parametrize("step", [lambda *a: step_ode(*a[:-1]), sde], ids=["ode", "sde"])
def test_the_marginal_variance_is_kept_as_steps_shrink(step: Callable[..., Transition]) -> None:
    coarse, fine = error_at_the_end(step, 200), error_at_the_end(step, 400)
    assert fine < 2e-3
    assert fine == pytest.approx(coarse / 2, rel=0.05)


@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9, 1.0])
def test_cps_keeps_the_marginal_of_a_point_mass_exactly(eta: float) -> None:
    sigmas = few_step_sigmas(4).double()[:-1]

    def step(x: Tensor, v: Tensor, here: Tensor, below: Tensor, noise: Tensor) -> Transition:
        return step_cps(x, v, here, below, eta, noise)

    torch.testing.assert_close(variance_after(step, sigmas, s=0.0), marginal(sigmas[-1:], 0.0))


@pytest.mark.parametrize("eta", [0.3, 0.9, 1.0])
def test_cps_narrows_a_wide_gaussian_by_what_a_mean_prediction_leaves_out(eta: float) -> None:
    """Coefficients are preserved, the marginal is not: ``P Q (1 - cos)^2 / (P + Q)`` is lost even as ``dt -> 0``."""
    s, sigma = 0.6, torch.tensor([0.5, 0.5], dtype=F64)
    data, noise = ((1 - sigma[:1]) * s) ** 2, sigma[:1] ** 2
    lost = data * noise * (1 - math.cos(eta * math.pi / 2)) ** 2 / (data + noise)
    torch.testing.assert_close(
        variance_after(lambda x, v, here, below, eps: step_cps(x, v, here, below, eta, eps), sigma, s),
        data + noise - lost,
    )


def test_the_sdes_first_step_from_pure_noise_is_finite() -> None:
    one = torch.ones(1, dtype=F64)
    step = step_sde(X[:1], V[:1], one, torch.full_like(one, 0.9), 0.7, 0.9, NOISE[:1])
    assert step.sample.isfinite().all()
    assert step.std == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1))


def test_the_sde_without_noise_is_euler() -> None:
    torch.testing.assert_close(step_sde(X, V, HERE, BELOW, 0.0, 0.9, NOISE).sample, step_ode(X, V, HERE, BELOW).sample)


# Whole rollouts.


def predict_gaussian(mu: float, s: float) -> Predict:
    velocity = gaussian_velocity(mu, s)
    return lambda x, sigma, rows: velocity(x, sigma)


def moments_of_ode(steps: int) -> tuple[float, float]:
    """Mean and standard deviation that ``sample`` gives ``N(2, 0.5^2)``: the map from noise is affine."""
    ends = sample(
        predict_gaussian(2.0, 0.5),
        torch.tensor([[0.0], [1.0]], dtype=F64),
        few_step_sigmas(steps).double(),
        FewStepSampler(steps),
    )
    return float(ends[0]), float(ends[1] - ends[0])


def test_exact_velocities_carry_noise_to_the_data() -> None:
    mean, std = moments_of_ode(1000)
    assert mean == pytest.approx(2.0, abs=1e-3)
    assert std == pytest.approx(0.5, abs=5e-3)


def test_more_steps_come_closer_to_the_data() -> None:
    errors = [abs(moments_of_ode(steps)[1] - 0.5) for steps in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)


def test_one_step_gives_the_datas_mean_whatever_the_noise() -> None:
    assert moments_of_ode(1) == pytest.approx((2.0, 0.0))


@kinds
def test_every_kind_moves_noise_towards_the_data(sampler: FewStepSampler) -> None:
    noise = random(2000, 1)
    stream = torch.Generator().manual_seed(1)
    x0 = sample(predict_gaussian(2.0, 0.5), noise, few_step_sigmas(4).double(), sampler, stream)
    assert x0.mean() == pytest.approx(2.0, abs=0.05)
    assert 0.1 < x0.std() < 0.55


class Counting:
    """An arbitrary network that notes which rows it was asked for."""

    def __init__(self) -> None:
        self.weight = torch.tensor(0.7, dtype=F64, requires_grad=True)
        self.asked: list[list[int]] = []

    def __call__(self, x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        assert len(x) == len(sigma) == len(rows)
        self.asked.append(rows.tolist())
        return self.weight * torch.tanh(x) + sigma.view(-1, 1, 1, 1) + rows.view(-1, 1, 1, 1)


@pytest.mark.parametrize(("batch", "steps"), [(4, 4), (12, 4), (6, 2), (5, 1)])
def test_backward_simulation_evaluates_only_the_samples_that_go_on(batch: int, steps: int) -> None:
    predict, level = Counting(), torch.arange(batch) % steps
    backward_simulation(
        predict, random(batch, 1, 2, 2), few_step_sigmas(steps), level, FewStepSampler(steps), torch.Generator()
    )
    assert sum(map(len, predict.asked)) == batch * (steps - 1) // 2
    assert predict.asked == [[row for row in range(batch) if level[row] > i] for i in range(steps - 1)]


def test_backward_simulation_stops_at_the_deepest_level_asked_for() -> None:
    predict = Counting()
    backward_simulation(
        predict, random(3, 1, 2, 2), few_step_sigmas(4), torch.tensor([0, 1, 0]), KINDS[0], torch.Generator()
    )
    assert predict.asked == [[1]]


@kinds
def test_backward_simulation_visits_the_states_of_a_plain_rollout(sampler: FewStepSampler) -> None:
    """The noise of a step belongs to its sample: who else goes on changes nothing."""
    noise, sigmas, level = random(8, 1, 2, 2), few_step_sigmas(4).double(), torch.arange(8) % 4
    state = backward_simulation(Counting(), noise, sigmas, level, sampler, torch.Generator().manual_seed(2))
    for stop in range(4):
        plain = sample(Counting(), noise, sigmas[: stop + 1], sampler, torch.Generator().manual_seed(2))
        torch.testing.assert_close(state.x_sigma[level == stop], plain[level == stop])


def test_backward_simulation_equals_rollouts_of_each_sample_alone() -> None:
    noise, sigmas, level = random(6, 1, 2, 2), few_step_sigmas(4).double(), torch.tensor([3, 0, 2, 1, 3, 2])
    state = backward_simulation(Counting(), noise, sigmas, level, KINDS[0], torch.Generator())
    for i, stop in enumerate(level.tolist()):

        def alone(x: Tensor, sigma: Tensor, rows: Tensor, i: int = i) -> Tensor:
            return Counting()(x, sigma, torch.tensor([i]))

        plain = sample(alone, noise[i : i + 1], sigmas[: stop + 1], KINDS[0])
        torch.testing.assert_close(state.x_sigma[i : i + 1], plain)


def test_a_state_knows_its_level() -> None:
    level = torch.tensor([2, 0, 3])
    state = backward_simulation(Counting(), random(3, 1, 2, 2), few_step_sigmas(4), level, KINDS[0], torch.Generator())
    assert torch.equal(state.level, level)
    assert state.sigma.tolist() == [0.5, 1.0, 0.25]


def test_a_sample_at_level_zero_is_pure_noise() -> None:
    noise = random(2, 1, 2, 2)
    state = backward_simulation(
        Counting(), noise, few_step_sigmas(4), torch.tensor([0, 3]), KINDS[1], torch.Generator()
    )
    assert torch.equal(state.x_sigma[0], noise[0])


def test_rollouts_carry_no_gradient() -> None:
    noise, sigmas = random(4, 1, 2, 2), few_step_sigmas(4)
    state = backward_simulation(Counting(), noise, sigmas, torch.arange(4), KINDS[0], torch.Generator())
    assert not state.x_sigma.requires_grad
    assert not sample(Counting(), noise, sigmas, KINDS[0]).requires_grad


def test_euler_rollouts_are_a_function_of_the_noise_alone() -> None:
    noise, sigmas = random(4, 1, 2, 2), few_step_sigmas(4)
    with_stream = sample(Counting(), noise, sigmas, KINDS[0], torch.Generator().manual_seed(3))
    assert torch.equal(with_stream, sample(Counting(), noise, sigmas, KINDS[0]))


@pytest.mark.parametrize("sampler", KINDS[1:], ids=lambda sampler: sampler.kind)
def test_kinds_with_fresh_noise_refuse_to_run_without_a_stream(sampler: FewStepSampler) -> None:
    with pytest.raises(ValueError, match="generator"):
        sample(Counting(), random(2, 1, 2, 2), few_step_sigmas(4), sampler)


@pytest.mark.parametrize(("steps", "eta", "named"), [(0, 0.9, "steps"), (4, 1.5, "eta"), (4, -0.1, "eta")])
def test_an_impossible_sampler_is_refused_by_name(steps: int, eta: float, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        FewStepSampler(steps, "cps", eta)
