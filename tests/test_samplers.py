"""Few-step samplers: how they relate, what variance they keep, and what a rollout evaluates."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.samplers import (
    CPS,
    ODE,
    SDE,
    Predict,
    Renoise,
    Sampler,
    Trajectory,
    Transition,
    draws_noise,
    rollout,
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

SAMPLERS = [ODE(), Renoise(), CPS(0.9)]
EVERY = [*SAMPLERS, SDE(0.7)]
SIGMA_MAX = 0.75
samplers = pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: type(sampler).__name__)
every_sampler = pytest.mark.parametrize("sampler", EVERY, ids=lambda sampler: type(sampler).__name__)


# One step.


def test_cps_without_fresh_noise_equals_ode() -> None:
    cps, ode = step_cps(X, V, HERE, BELOW, 0.0, NOISE), step_ode(X, V, HERE, BELOW)
    torch.testing.assert_close(cps.sample, ode.sample, rtol=1e-13, atol=1e-15)
    assert torch.equal(cps.std, torch.zeros_like(HERE))


def test_cps_with_only_fresh_noise_equals_renoise() -> None:
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


def test_step_samples_its_mean_plus_std_times_noise() -> None:
    for step in every_step(NOISE):
        torch.testing.assert_close(step.sample, step.mean + step.std.view(-1, 1, 1, 1) * NOISE)


def test_step_mean_and_std_do_not_depend_on_the_noise() -> None:
    for one, other in zip(every_step(NOISE), every_step(NOISE + 1)):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


@every_sampler
def test_last_step_is_the_predicted_x0_without_noise(sampler: Sampler) -> None:
    last = sampler.step(X, V, HERE, torch.zeros_like(HERE), NOISE, SIGMA_MAX)
    torch.testing.assert_close(last.sample, X - HERE.view(-1, 1, 1, 1) * V)
    assert torch.equal(last.std, torch.zeros_like(HERE))


@samplers
def test_step_with_the_true_velocity_stays_between_data_and_noise(sampler: Sampler) -> None:
    """With the pair's own velocity a step gives ``(1 - s') x0 + s' eps'``, with ``eps'`` as normal as ``eps``."""
    x0, eps = random(20000, 1, seed=3), random(20000, 1, seed=4)
    here, below = torch.full((20000,), 0.7, dtype=F64), torch.full((20000,), 0.4, dtype=F64)
    step = sampler.step(renoise(x0, here, eps), eps - x0, here, below, random(20000, 1, seed=5), SIGMA_MAX)
    fresh = (step.sample - 0.6 * x0) / 0.4
    assert fresh.mean() == pytest.approx(0, abs=0.03)
    assert fresh.var() == pytest.approx(1, abs=0.04)
    assert (fresh * x0).mean() == pytest.approx(0, abs=0.03)


# Gaussian data N(mu, s^2): a step with the exact velocity is affine, so its distribution needs no sampling.


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
def test_step_keeps_the_marginal_variance_as_steps_shrink(step: Callable[..., Transition]) -> None:
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


def test_sde_step_from_pure_noise_is_finite() -> None:
    one = torch.ones(1, dtype=F64)
    step = step_sde(X[:1], V[:1], one, torch.full_like(one, 0.9), 0.7, 0.9, NOISE[:1])
    assert step.sample.isfinite().all()
    assert step.std == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1))


def test_sde_without_noise_equals_ode() -> None:
    torch.testing.assert_close(step_sde(X, V, HERE, BELOW, 0.0, 0.9, NOISE).sample, step_ode(X, V, HERE, BELOW).sample)


# Whole rollouts.


def predict_gaussian(mu: float, s: float) -> Predict:
    velocity = gaussian_velocity(mu, s)
    return lambda x, sigma, rows: velocity(x, sigma)


def moments_of_ode(steps: int) -> tuple[float, float]:
    """Mean and standard deviation that ``rollout`` gives ``N(2, 0.5^2)``: the map from noise is affine."""
    noise = torch.tensor([[0.0], [1.0]], dtype=F64)
    ends = rollout(predict_gaussian(2.0, 0.5), noise, few_step_sigmas(steps).double(), ODE()).x0
    return float(ends[0]), float(ends[1] - ends[0])


def test_rollout_with_exact_velocities_gives_the_data() -> None:
    mean, std = moments_of_ode(1000)
    assert mean == pytest.approx(2.0, abs=1e-3)
    assert std == pytest.approx(0.5, abs=5e-3)


def test_rollout_with_more_steps_is_closer_to_the_data() -> None:
    errors = [abs(moments_of_ode(steps)[1] - 0.5) for steps in (1, 2, 4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)


def test_rollout_with_one_step_gives_the_datas_mean() -> None:
    assert moments_of_ode(1) == pytest.approx((2.0, 0.0))


@samplers
def test_rollout_moves_noise_toward_the_data(sampler: Sampler) -> None:
    noise = random(2000, 1)
    stream = torch.Generator().manual_seed(1)
    x0 = rollout(predict_gaussian(2.0, 0.5), noise, few_step_sigmas(4).double(), sampler, stream).x0
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


def stopped(
    predict: Predict, noise: Tensor, stop: Tensor, sampler: Sampler = ODE(), seed: int = 2, steps: int = 4
) -> Tensor:
    """States at which samples stop after a backward simulation."""
    rng = torch.Generator().manual_seed(seed)
    return rollout(predict, noise, few_step_sigmas(steps).double(), sampler, rng, stop).states[-1]


@pytest.mark.parametrize(("batch", "steps"), [(4, 4), (12, 4), (6, 2), (5, 1)])
def test_rollout_with_stops_evaluates_only_the_samples_that_go_on(batch: int, steps: int) -> None:
    predict, stop = Counting(), torch.arange(batch) % steps
    stopped(predict, random(batch, 1, 2, 2), stop, steps=steps)
    assert sum(map(len, predict.asked)) == batch * (steps - 1) // 2
    assert predict.asked == [[row for row in range(batch) if stop[row] > i] for i in range(steps - 1)]


def test_rollout_ends_at_the_last_stop() -> None:
    predict = Counting()
    stopped(predict, random(3, 1, 2, 2), torch.tensor([0, 1, 0]))
    assert predict.asked == [[1]]


@every_sampler
def test_rollout_with_stops_visits_the_states_of_a_full_rollout(sampler: Sampler) -> None:
    """The noise of a step belongs to its sample: which other samples go on changes nothing."""
    noise, stop = random(8, 1, 2, 2), torch.arange(8) % 4
    found = stopped(Counting(), noise, stop, sampler)
    rng = torch.Generator().manual_seed(2)
    states = rollout(Counting(), noise, few_step_sigmas(4).double(), sampler, rng).states
    for k in range(4):
        torch.testing.assert_close(found[stop == k], states[k][stop == k])


def test_rollout_with_stops_equals_rollouts_of_each_sample_alone() -> None:
    noise, sigmas, stop = random(6, 1, 2, 2), few_step_sigmas(4).double(), torch.tensor([3, 0, 2, 1, 3, 2])
    found = stopped(Counting(), noise, stop)
    for i, k in enumerate(stop.tolist()):

        def alone(x: Tensor, sigma: Tensor, rows: Tensor, i: int = i) -> Tensor:
            return Counting()(x, sigma, torch.tensor([i]))

        states = rollout(alone, noise[i : i + 1], sigmas, ODE()).states
        torch.testing.assert_close(found[i : i + 1], states[k])


def test_rollout_with_stop_zero_keeps_pure_noise() -> None:
    noise = random(2, 1, 2, 2)
    assert torch.equal(stopped(Counting(), noise, torch.tensor([0, 3]), Renoise())[0], noise[0])


def test_rollout_with_stops_has_no_transitions() -> None:
    noise, sigmas = random(4, 1, 2, 2), few_step_sigmas(4)
    assert rollout(Counting(), noise, sigmas, ODE(), stop=torch.arange(4)).transitions == ()


def test_rollout_passes_each_steps_sigma() -> None:
    asked = []

    def predict(x: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        asked.append(sigma.tolist())
        return x

    rollout(predict, random(2, 1, 2, 2), few_step_sigmas(4), ODE())
    assert asked == [[sigma, sigma] for sigma in (1.0, 0.75, 0.5, 0.25)]


def test_rollout_carries_no_gradient() -> None:
    noise, sigmas = random(4, 1, 2, 2), few_step_sigmas(4)
    assert not stopped(Counting(), noise, torch.arange(4)).requires_grad
    assert not rollout(Counting(), noise, sigmas, ODE()).x0.requires_grad


def test_ode_rollout_is_a_function_of_its_noise_alone() -> None:
    noise, sigmas = random(4, 1, 2, 2), few_step_sigmas(4)
    with_stream = rollout(Counting(), noise, sigmas, ODE(), torch.Generator().manual_seed(3)).x0
    assert torch.equal(with_stream, rollout(Counting(), noise, sigmas, ODE()).x0)


@pytest.mark.parametrize("sampler", EVERY[1:], ids=lambda sampler: type(sampler).__name__)
def test_stochastic_rollout_without_rng_is_refused(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match="needs an rng"):
        rollout(Counting(), random(2, 1, 2, 2), few_step_sigmas(4), sampler)


@pytest.mark.parametrize(
    ("sampler", "value", "named"), [(CPS, 1.5, "eta"), (CPS, -0.1, "eta"), (SDE, 0.0, "noise_level")]
)
def test_sampler_settings_out_of_range_are_refused_by_name(
    sampler: Callable[[float], Sampler], value: float, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        sampler(value)


# Trajectories.


def trajectory(sampler: Sampler, batch: int = 3, steps: int = 4) -> tuple[Trajectory, Predict]:
    predict = predict_gaussian(2.0, 0.5)
    rng = torch.Generator().manual_seed(2)
    return rollout(predict, random(batch, 2, 2, 1), few_step_sigmas(steps).double(), sampler, rng), predict


@every_sampler
def test_trajectory_redo_equals_the_step_taken(sampler: Sampler) -> None:
    path, predict = trajectory(sampler)
    assert len(path.transitions) == 4
    for k, taken in enumerate(path.transitions):
        again = path.redo(predict, k)
        assert torch.equal(again.mean, taken.mean)
        assert torch.equal(again.std, taken.std)


@every_sampler
def test_trajectory_states_are_its_transitions_samples(sampler: Sampler) -> None:
    path, _ = trajectory(sampler)
    assert all(torch.equal(step.sample, path.states[k + 1]) for k, step in enumerate(path.transitions))
    assert torch.equal(path.x0, path.states[4])


@every_sampler
def test_trajectory_redo_passes_gradient_to_the_predictor(sampler: Sampler) -> None:
    path, predict = trajectory(sampler)
    weight = torch.ones((), dtype=F64, requires_grad=True)
    path.redo(lambda x, sigma, rows: weight * predict(x, sigma, rows), 1).mean.square().sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs() > 0


@pytest.mark.parametrize("sampler", [Renoise(), CPS(0.9), SDE(0.7)], ids=lambda sampler: type(sampler).__name__)
def test_trajectory_log_prob_is_the_normals_averaged_over_elements(sampler: Sampler) -> None:
    path, _ = trajectory(sampler)
    for k in range(3):
        step = path.transitions[k]
        normal = torch.distributions.Normal(step.mean, step.std.view(-1, 1, 1, 1).expand_as(step.mean))
        torch.testing.assert_close(path.log_prob(k), normal.log_prob(path.states[k + 1]).flatten(1).mean(1))


def test_trajectory_log_prob_of_a_redone_step_has_ratio_one() -> None:
    path, predict = trajectory(SDE(0.7))
    assert torch.equal(path.redo(predict, 2).log_prob(path.states[3]), path.log_prob(2))


def test_sde_uses_the_grids_first_level_below_one_at_pure_noise() -> None:
    path, _ = trajectory(SDE(0.7))
    expected = 0.7 * math.sqrt(1 / (1 - 0.75)) * math.sqrt(0.25)
    torch.testing.assert_close(path.transitions[0].std, torch.full((3,), expected, dtype=F64))


def test_sde_with_one_step_is_euler() -> None:
    noise, sigmas, predict = random(3, 2, 2, 1), few_step_sigmas(1).double(), predict_gaussian(2.0, 0.5)
    rng = torch.Generator().manual_seed(2)
    assert torch.equal(rollout(predict, noise, sigmas, SDE(), rng).x0, rollout(predict, noise, sigmas, ODE()).x0)


@pytest.mark.parametrize(
    ("sampler", "stochastic", "scheduler"),
    [(ODE(), False, "euler"), (Renoise(), True, "renoise"), (CPS(), True, None), (SDE(), True, None)],
)
def test_sampler_names_the_scheduler_that_repeats_it(sampler: Sampler, stochastic: bool, scheduler: str | None) -> None:
    assert (sampler.stochastic, sampler.scheduler) == (stochastic, scheduler)


def test_squared_error_log_prob_is_the_gaussian_ones_without_its_scale_and_constants() -> None:
    """RTDMD's convention: differences of log-probabilities differ by the factor 2 std^2."""
    step = Transition(X, torch.tensor([0.5, 1.0, 2.0], dtype=F64), X)
    near, far = X + NOISE / 10, X + V
    assert torch.equal(step.log_prob(X, "squared_error"), torch.zeros(3, dtype=F64))
    torch.testing.assert_close(step.log_prob(far, "squared_error"), -V.square().mean((1, 2, 3)))
    gaussian = step.log_prob(near) - step.log_prob(far)
    plain = step.log_prob(near, "squared_error") - step.log_prob(far, "squared_error")
    torch.testing.assert_close(plain, gaussian * 2 * step.std**2)


def test_trajectory_log_prob_takes_both_conventions() -> None:
    path, _ = trajectory(CPS(0.9))
    error = (path.states[2] - path.transitions[1].mean).square().mean((1, 2, 3))
    assert torch.equal(path.log_prob(1, "squared_error"), -error)
    assert not torch.allclose(path.log_prob(1), path.log_prob(1, "squared_error"))


def test_trajectory_select_keeps_the_rows_of_every_state_and_step() -> None:
    path, predict = trajectory(CPS(0.9))
    part = path.select(slice(1, 3))
    assert torch.equal(part.x0, path.x0[1:])
    assert len(part.states) == 5
    for k in range(3):
        assert torch.equal(part.log_prob(k), path.log_prob(k)[1:])
        assert torch.equal(part.transitions[k].sample, path.transitions[k].sample[1:])
        torch.testing.assert_close(part.redo(predict, k).mean, path.redo(predict, k).mean[1:])


@pytest.mark.parametrize(
    ("sampler", "noisy"), [(ODE(), False), (CPS(0.0), False), (CPS(0.1), True), (SDE(0.7), True), (Renoise(), True)]
)
def test_draws_noise_tells_whether_steps_have_a_density(sampler: Sampler, noisy: bool) -> None:
    assert draws_noise(sampler) == noisy
