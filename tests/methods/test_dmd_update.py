"""One update of DMD in the world that is known in closed form: states, questions, gradients, the critic, averages."""

import pytest
import torch
from world import SHAPE, World, near, noise_in

from gdmd_lightning.engines.base import Engine
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.samplers import CPS, SDE, Renoise
from gdmd_lightning.schedules import Uniform
from gdmd_lightning.streams import draw_noise

pytestmark = pytest.mark.usefixtures("float64")


def sample(world: World):
    """The state that was asked about with gradient, and the sample that follows from it in closed form."""
    (state,) = world.questions("generator", learning=True)
    return state, world.x0("generator", state.x, state.sigma, state.c)


def opinions(world: World):
    _, x = sample(world)
    (teacher,) = world.questions("teacher")
    (fake,) = world.questions("fake_score", inside="generator")
    real = world.x0("teacher", teacher.x, teacher.sigma, world.c, world.module.matching.guidance_scale)
    return x, teacher, real, fake, world.x0("fake_score", fake.x, fake.sigma, world.c)


# The generator's step.


@pytest.mark.parametrize("floor", [1e-3, 0.9])
def test_generator_gradient_is_the_closed_form(floor):
    world = World(DMD, matching=Matching(guidance_scale=2.5, floor=floor))
    _, steps = world.update()
    state, x = sample(world)
    x, _, real, _, fake = opinions(world)
    n = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=floor)
    expected = world.pull_back("generator", state.sigma, state.c, (fake - real) / n / x.numel())
    near(steps[0].gradient, expected)


def test_generator_moves_against_the_closed_form_gradient_at_rate_1():
    world = World(DMD)
    before = world.weights("generator")
    _, steps = world.update(rate=1.0)
    near(world.weights("generator"), {name: before[name] - steps[0].gradient[name] for name in before})


def test_generator_moves_toward_the_teacher_when_the_fake_score_is_right():
    world = World(DMD, matching=Matching(guidance_scale=1.0))
    world.set("generator", gain=0.5, shift=0.0, variance=0.5)
    world.set("fake_score", gain=0.5, shift=0.0, variance=0.5)
    world.update(rate=0.05)
    assert 0.5 < world.weights("generator")["gain"] < 1.0


def test_teacher_is_the_fixed_point():
    world = World(DMD, matching=Matching(guidance_scale=1.0))
    world.make_equal("teacher", "generator", "fake_score")
    _, steps = world.update()
    near(steps[0].gradient, {"gain": torch.tensor(0.0), "shift": torch.zeros(SHAPE)})


def test_many_updates_end_at_the_teacher():
    world = World(DMD, matching=Matching(guidance_scale=1.0, fake_score_updates=1), prompts=4, each=16, steps=1)
    for role in ("generator", "fake_score"):
        world.set(role, gain=0.2, shift=0.5, variance=0.5)
    for _ in range(150):
        world.update(rate=0.3)
        world.make_equal("generator", "fake_score")
    assert abs(float(world.weights("generator")["gain"]) - 1) < 0.05
    assert float(world.weights("generator")["shift"].abs().max()) < 0.05


# Who was asked what.


def test_teacher_is_asked_with_guidance_and_the_others_without():
    world = World(DMD, matching=Matching(guidance_scale=2.5))
    world.update()
    asked = {(q.role, q.guidance_scale) for q in world.asked}
    assert asked == {("teacher", 2.5), ("generator", 1.0), ("fake_score", 1.0)}


def test_every_question_is_about_its_own_prompts_row():
    world = World(DMD)
    world.update()
    for q in [*world.questions("teacher"), *world.questions("fake_score"), *world.questions("generator", True)]:
        assert torch.equal(q.c, world.c)


def test_teacher_and_fake_score_see_the_same_renoised_samples():
    world = World(DMD)
    world.update()
    _, teacher, _, fake, _ = opinions(world)
    assert torch.equal(teacher.x, fake.x)
    assert torch.equal(teacher.sigma, fake.sigma)


def test_samples_are_renoised_with_standard_normal_noise():
    world = World(DMD, prompts=5, each=40)
    world.update()
    x, teacher, *_ = opinions(world)
    noise = noise_in(teacher, x)
    assert abs(float(noise.mean())) < 0.1
    assert abs(float(noise.std()) - 1) < 0.05
    correlation = torch.corrcoef(torch.stack([noise.flatten(), x.flatten()]))[0, 1]
    assert abs(float(correlation)) < 0.1


def test_renoise_noise_comes_from_a_stream_of_its_own():
    world = World(DMD)
    state = world.module.rollout_state(world.batch)
    expected = draw_noise((len(world.batch), *SHAPE), world.module.stream("renoise"), torch.device("cpu"))
    near(world.module.draw_renoise(state).eps[:, 0], expected)


def test_renoise_levels_come_from_the_distribution():
    world = World(DMD, matching=Matching(renoise_distribution=Uniform(0.5, 0.6)), prompts=5, each=20)
    world.update()
    (teacher,) = world.questions("teacher")
    assert 0.5 <= teacher.sigma.min() < 0.52
    assert 0.58 < teacher.sigma.max() <= 0.6


def test_step_interval_matches_only_above_the_level_at_which_the_step_ends():
    world = World(DMD, matching=Matching(interval="step"), prompts=4, each=20)
    world.update()
    (state,) = world.questions("generator", learning=True)
    (teacher,) = world.questions("teacher")
    ends = torch.tensor([0.8, 0.6, 0.4, 0.0])[((1 - state.sigma) / 0.2).round().long()]
    for asked in (teacher, *world.questions("fake_score", learning=True)):
        assert (asked.sigma >= ends - 1e-6).all()
        assert ((asked.sigma - ends).view(4, 20).amin(1) < 0.25).all()


# Backward simulation.


def simulated(world: World, step) -> tuple[torch.Tensor, torch.Tensor]:
    """States by a loop over single samples; ``step(x, x0, eps, sigma, next, noise)`` is the sampler's."""
    rng = world.module.stream("rollout")
    batch, steps = len(world.batch), world.module.steps
    rng = rng.common
    noise = torch.randn(batch, *SHAPE, generator=rng)
    first = int(torch.randint(steps, (1,), generator=rng))
    stops = [(int(g) + first) % steps for g in world.batch.groups]
    fresh = [torch.randn(batch, *SHAPE, generator=rng) for _ in range(steps)] if world.module.sampler.stochastic else []
    sigmas = world.module.sigmas
    states = []
    for b, stop in enumerate(stops):
        x = noise[b : b + 1]
        for k in range(stop):
            sigma = sigmas[k : k + 1]
            x0 = world.x0("generator", x, sigma, world.c[b : b + 1])
            extra = fresh[k][b : b + 1] if fresh else None
            x = step(x0, (x - (1 - sigma) * x0) / sigma, float(sigma), float(sigmas[k + 1]), extra)
        states.append(x)
    return torch.cat(states), sigmas[stops]


def cps(x0, eps, sigma, below, noise, angle=0.4 * torch.pi / 2):
    kept, fresh = torch.cos(torch.tensor(angle)), torch.sin(torch.tensor(angle))
    return (1 - below) * x0 + below * (kept * eps + fresh * noise)


def sde(x0, eps, sigma, below, noise, level=0.5, top=0.8):
    """Flow-GRPO's Euler-Maruyama step, written with the score of the flow's marginal, ``-eps / sigma``."""
    g2 = level**2 * sigma / (1 - (top if sigma >= 1 else sigma))
    x, v, down = (1 - sigma) * x0 + sigma * eps, eps - x0, sigma - below
    return x - down * v - down * g2 / 2 * eps / sigma + (g2 * down) ** 0.5 * noise


@pytest.mark.parametrize(
    ("sampler", "step"),
    [
        (None, lambda x0, eps, sigma, below, noise: (1 - below) * x0 + below * eps),
        (Renoise(), lambda x0, eps, sigma, below, noise: (1 - below) * x0 + below * noise),
        (CPS(0.4), cps),
        (SDE(0.5), sde),
    ],
    ids=["ode", "renoise", "cps", "sde"],
)
def test_states_are_those_of_a_loop_over_single_samples(sampler, step):
    world = World(DMD, prompts=4, each=2, **({} if sampler is None else {"sampler": sampler}))
    x, sigma = simulated(world, step)
    world.update()
    (state,) = world.questions("generator", learning=True)
    near(state.sigma, sigma)
    near(state.x, x)


def test_all_samples_of_a_prompt_are_at_one_step_and_prompts_cover_the_steps():
    world = World(DMD, prompts=4, each=3)
    world.update()
    (state,) = world.questions("generator", learning=True)
    levels = state.sigma.view(4, 3)
    assert (levels == levels[:, :1]).all()
    near(levels[:, 0].sort(descending=True).values, world.module.sigmas[:4])


def test_simulation_evaluates_each_sample_only_on_its_own_way():
    world = World(DMD, prompts=4, each=2)
    world.update()
    rows = [len(q.x) for q in world.questions("generator", learning=False)]
    assert rows == [6, 4, 2]


def test_the_first_step_changes_between_updates():
    world = World(DMD, prompts=1)
    seen = set()
    for _ in range(30):
        world.update()
        seen |= {round(float(s), 3) for s in world.questions("generator", learning=True)[0].sigma}
    assert len(seen) == 4


# The fake score's steps.


def critic_questions(world: World):
    return world.questions("fake_score", learning=True)


@pytest.mark.parametrize("weight", [None, lambda sigma: (1 - sigma) ** 2], ids=["velocity", "noise"])
def test_fake_score_gradient_is_flow_matching_on_the_generators_samples(weight):
    world = World(DMD, matching=Matching(fake_score_updates=2))
    if weight is not None:
        world.module.family.error_weight = weight
    _, steps = world.update()
    _, x = sample(world)
    for q, step in zip(critic_questions(world), steps[1:], strict=True):
        eps = noise_in(q, x)
        x0 = world.x0("fake_score", q.x, q.sigma, q.c)
        s = q.sigma.view(-1, 1, 1, 1)
        d_velocity = 2 * ((q.x - x0) / s - (eps - x)) / x.numel()
        if weight is not None:
            d_velocity = weight(s) * d_velocity
        # velocity = (x_sigma - x0) / sigma
        near(step.gradient, world.pull_back("fake_score", q.sigma, q.c, -d_velocity / s))


def test_fake_score_sees_samples_under_standard_normal_noise():
    world = World(DMD, prompts=5, each=40)
    world.update()
    _, x = sample(world)
    for q in critic_questions(world):
        assert abs(float(noise_in(q, x).std()) - 1) < 0.05


def test_fake_score_learns_the_distribution_of_the_generator():
    world = World(DMD, prompts=5, each=40, steps=1, matching=Matching(1.0, Uniform(0.5, 1.0), fake_score_updates=40))
    world.set("generator", gain=0.4, shift=0.2, variance=0.5)
    world.roles.standalone("fake_score").variance.fill_(1e-3)  # with one step the samples have no spread
    for _ in range(4):
        engine_rate(world, 0.2)
    assert abs(float(world.weights("fake_score")["gain"]) - 0.4) < 0.05


def engine_rate(world: World, rate: float) -> None:
    """One update at a rate, with the generator put back."""
    before = {k: v.clone() for k, v in world.roles.standalone("generator").state_dict().items()}
    world.update(rate=rate)
    world.roles.standalone("generator").load_state_dict(before)


def test_fake_score_steps_as_often_as_asked_after_the_generator():
    world = World(DMD, matching=Matching(fake_score_updates=3))
    _, steps = world.update()
    assert [step.role for step in steps] == ["generator", "fake_score", "fake_score", "fake_score"]


def test_fake_score_moves_and_the_teacher_does_not():
    world = World(DMD)
    fake, teacher = world.weights("fake_score"), world.weights("teacher")
    world.update(rate=0.1)
    assert not torch.equal(fake["gain"], world.weights("fake_score")["gain"])
    assert torch.equal(teacher["gain"], world.weights("teacher")["gain"])


def test_every_turn_of_the_fake_score_has_its_own_levels_and_noise():
    world = World(DMD, matching=Matching(fake_score_updates=3))
    world.update()
    _, x = sample(world)
    one, two, three = critic_questions(world)
    assert not torch.allclose(one.sigma, two.sigma)
    assert not torch.allclose(two.sigma, three.sigma)
    assert not torch.allclose(noise_in(one, x), noise_in(two, x))


def test_fake_score_learns_at_levels_of_its_own_distribution():
    matching = Matching(renoise_distribution=Uniform(0.1, 0.2), fake_score_renoise_distribution=Uniform(0.7, 0.9))
    world = World(DMD, matching=matching)
    world.update()
    assert all(q.sigma.min() >= 0.7 and q.sigma.max() <= 0.9 for q in critic_questions(world))
    assert world.questions("teacher")[0].sigma.max() <= 0.2


def test_fake_score_levels_default_to_those_of_matching():
    world = World(DMD, matching=Matching(renoise_distribution=Uniform(0.1, 0.2)))
    world.update()
    assert all(q.sigma.min() >= 0.1 and q.sigma.max() <= 0.2 for q in critic_questions(world))


def test_fake_score_levels_are_stratified_over_the_batch():
    world = World(DMD, prompts=5, each=2, matching=Matching(renoise_distribution=Uniform(0.0, 1.0)))
    world.update()
    for q in critic_questions(world):
        assert torch.equal((q.sigma * 10).long(), torch.arange(10))


def test_reused_samples_cost_no_evaluation_of_the_generator():
    world = World(DMD)
    world.update()
    first = next(k for k, q in enumerate(world.asked) if q.learner == "fake_score")
    assert not [q for q in world.asked[first:] if q.role == "generator"]


def test_fresh_samples_are_new_ones_of_the_generator_after_its_step():
    world = World(DMD, matching=Matching(fake_score_updates=2, fake_score_samples="fresh"), prompts=4)
    world.update(rate=0.5)
    _, reused = sample(world)
    learned = [k for k, q in enumerate(world.asked) if q.learner == "fake_score"]
    found = []
    for k in learned:
        state, critic = world.asked[k - 1], world.asked[k]
        assert state.role == "generator"
        assert not state.gradient
        assert len(state.x) == len(world.batch)
        found.append(world.x0("generator", state.x, state.sigma, state.c, now=True))
        assert abs(float(noise_in(critic, found[-1]).std()) - 1) < 0.25
    assert not torch.allclose(found[0], found[1])
    assert not torch.allclose(found[0], reused)


# Averages, logs.


def test_average_follows_the_generator_after_its_step_with_its_decay():
    world = World(DMD, ema_decay=0.75)
    before = world.weights("ema")
    world.update(rate=0.5)
    after = world.weights("generator")
    near(world.weights("ema"), {name: 0.75 * before[name] + 0.25 * after[name] for name in before})


def test_average_moves_once_per_update_whatever_the_fake_scores_steps():
    moves = []
    world = World(DMD, matching=Matching(fake_score_updates=4))
    move = world.roles._average
    world.roles._average = lambda *call: (moves.append(call), move(*call))
    world.update()
    assert [call[:2] for call in moves] == [("ema", "generator")]


def test_logs_are_the_closed_form_figures():
    world = World(DMD, matching=Matching(guidance_scale=2.0, floor=0.4, fake_score_updates=2), prompts=4)
    done, steps = world.update()
    x, _, real, _, fake = opinions(world)
    raw = (x - real).abs().mean((1, 2, 3))
    n = raw.clamp(min=0.4)
    expected = {
        "loss": (0.5 * (fake - real).square().mean((1, 2, 3)) / n).mean(),
        "gradient": ((fake - real).abs().mean((1, 2, 3)) / n).mean(),
        "normalizer": n.mean(),
        "clamped": (raw <= 0.4).double().mean(),
        "sample_std": x.std(),
        "fake_score_loss": (steps[1].losses[0] + steps[2].losses[0]) / 2,
    }
    assert done.logs.keys() == expected.keys()
    near(done.logs, expected)


def test_fake_score_loss_is_the_mean_squared_velocity_error():
    world = World(DMD, matching=Matching(fake_score_updates=1))
    _, steps = world.update()
    _, x = sample(world)
    (q,) = critic_questions(world)
    v = (q.x - world.x0("fake_score", q.x, q.sigma, q.c)) / q.sigma.view(-1, 1, 1, 1)
    near(steps[1].losses[0], (v - (noise_in(q, x) - x)).square().mean())


# Random streams.


def noises(world: World) -> dict[str, torch.Tensor]:
    """All noise and levels of one update, by purpose."""
    world.update()
    _, x = sample(world)
    (teacher,) = world.questions("teacher")
    first = world.questions("generator", learning=False)[0]
    critic = critic_questions(world)[0]
    return {
        "rollout": first.x,
        "level": teacher.sigma,
        "renoise": noise_in(teacher, x),
        "critic level": critic.sigma,
        "critic": noise_in(critic, x),
    }


@pytest.mark.parametrize("what", ["rollout", "level", "renoise", "critic level", "critic"])
def test_draws_differ_between_updates(what):
    world = World(DMD, prompts=4)
    one, two = noises(world)[what], noises(world)[what]
    assert one.shape != two.shape or not torch.allclose(one, two)


def test_rollouts_start_from_new_noise_in_every_update():
    world = World(DMD, steps=1)
    starts = []
    for _ in range(2):
        world.update()
        starts.append(world.questions("generator", learning=True)[0].x)
    assert not torch.allclose(*starts)


@pytest.mark.parametrize("what", ["level", "renoise", "critic level", "critic"])
def test_draws_differ_between_ranks(what, monkeypatch):
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(DMD, "global_rank", rank)
        monkeypatch.setattr(DMD, "world_size", 2)
        found.append(noises(World(DMD, prompts=4))[what])
    assert not torch.allclose(*found)


def test_rollouts_differ_between_ranks(monkeypatch):
    found = []
    for rank in (0, 1):
        monkeypatch.setattr(DMD, "global_rank", rank)
        monkeypatch.setattr(DMD, "world_size", 2)
        world = World(DMD, steps=1)
        world.update()
        found.append(world.questions("generator", learning=True)[0].x)
    assert not torch.allclose(*found)


def test_draws_differ_between_seeds_and_repeat_with_one():
    one, same, other = (noises(World(DMD, prompts=4, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[what], same[what]) for what in one)
    assert not torch.allclose(one["renoise"], other["renoise"])


def test_purposes_draw_from_different_streams():
    world = World(DMD, steps=1)
    world.update()
    _, x = sample(world)
    start = world.questions("generator", learning=True)[0].x
    (teacher,) = world.questions("teacher")
    drawn = [start, noise_in(teacher, x), noise_in(critic_questions(world)[0], x)]
    for i in range(3):
        for j in range(i):
            assert not torch.allclose(drawn[i], drawn[j])


# The engine's script.


def test_an_exception_steps_nothing():
    world = World(DMD)
    stepped = []

    class Broken(Engine):
        def zero_grad(self, role):
            pass

        def backward(self, loss):
            raise RuntimeError("no gradient")

        def step(self, role):
            stepped.append(role)

    before = world.weights("ema")
    with pytest.raises(RuntimeError):
        world.module.update(world.batch, Broken(world.roles))
    assert stepped == []
    assert torch.equal(before["gain"], world.weights("ema")["gain"])
    assert world.roles.learner is None
