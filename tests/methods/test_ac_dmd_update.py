"""One update of AC-DMD in the world that is known in closed form: transitions, matching at ``s``, the fake score."""

import math

import pytest
import torch
from world import SHAPE, World, near

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.settings import Consistency, Matching
from gdmd_lightning.samplers import CPS, ODE, SDE, Renoise
from gdmd_lightning.schedules import Uniform
from gdmd_lightning.streams import draw_noise, draw_uniform

pytestmark = pytest.mark.usefixtures("float64")

SAMPLERS = {"cps": (CPS(0.4), 0.4), "ode": (ODE(), 0.0), "renoise": (Renoise(), 1.0)}


def matching(**options) -> Matching:
    return Matching(**{"guidance_scale": 2.5, "interval": "step", "fake_score_updates": 2, **options})


def ac_dmd(sampler="cps", **options) -> World:
    options = {"matching": matching(), "prompts": 4, **options}
    if sampler == "ode":
        options["consistency"] = Consistency(weight=0.0)
    return World(ACDMD, sampler=SAMPLERS[sampler][0], **options)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def step(x, x0, sigma, s, noise, eta):
    """A coefficient-preserving step, from the clean latents."""
    sigma, s, angle = column(sigma), column(s), torch.tensor(eta * math.pi / 2)
    return (1 - s) * x0 + s * (angle.cos() * (x - (1 - sigma) * x0) / sigma + angle.sin() * noise)


def slope(sigma, s, eta):
    """Of that step in ``x0``."""
    return column((1 - s) - s * math.cos(eta * math.pi / 2) * (1 - sigma) / sigma)


class Matched:
    """An update's quantities in closed form; its noise is read from the streams before the update."""

    def __init__(self, world: World, eta: float) -> None:
        self.world, self.eta = world, eta
        module, batch = world.module, len(world.batch)
        device = torch.device("cpu")
        noise = {name: draw_noise((batch, *SHAPE), module.stream(name), device)
                 for name in ("transition", "transition back", "renoise")}  # fmt: skip
        self.done, self.steps = world.update()
        (self.state,) = world.questions("generator", learning=True)
        self.s = torch.tensor([0.8, 0.6, 0.4, 0.0])[((1 - self.state.sigma) / 0.2).round().long()]
        x0 = world.x0("generator", self.state.x, self.state.sigma, world.c)
        self.x_s = step(self.state.x, x0, self.state.sigma, self.s, noise["transition"], eta)
        (teacher,) = world.questions("teacher")
        self.asked, self.t = teacher, teacher.sigma
        a, q = self.coefficients(self.t)
        self.x_t = column(a) * self.x_s + column(q) * noise["renoise"]
        real = world.x0("teacher", teacher.x, self.t, world.c, 2.5)
        fake = world.x0("fake_score", teacher.x, self.t, world.c)
        self.real, self.fake = (step(teacher.x, end, self.t, self.s, noise["transition back"], eta)
                                for end in (real, fake))  # fmt: skip
        self.n = (self.x_s - self.real).abs().mean((1, 2, 3)).clamp(min=module.matching.floor)

    def coefficients(self, t):
        a = (1 - t) / (1 - self.s)
        return a, (t * t - (a * self.s) ** 2).sqrt()


# The generator's step.


@pytest.mark.parametrize(("sampler", "floor"), [("cps", 1e-3), ("cps", 0.9), ("ode", 1e-3), ("renoise", 1e-3)])
def test_generator_gradient_is_the_closed_form(sampler, floor):
    m = Matched(ac_dmd(sampler, matching=matching(floor=floor)), SAMPLERS[sampler][1])
    near(m.asked.x, m.x_t)
    d_x_s = (m.fake - m.real) / column(m.n) / m.x_s.numel()
    d_x0 = slope(m.state.sigma, m.s, m.eta) * d_x_s
    near(m.steps[0].gradient, m.world.pull_back("generator", m.state.sigma, m.world.c, d_x0))
    near(m.done.logs["normalizer"], m.n.mean())
    near(m.done.logs["gradient"], ((m.fake - m.real) / column(m.n)).abs().mean())


def test_estimators_are_asked_at_the_same_latents_above_the_end_of_the_step():
    world = ac_dmd(each=20)
    m = Matched(world, 0.4)
    (fake,) = world.questions("fake_score", inside="generator")
    assert torch.equal(fake.x, m.asked.x)
    assert (fake.guidance_scale, m.asked.guidance_scale) == (1.0, 2.5)
    assert (m.t > m.s).all()
    assert ((m.t - m.s).view(4, 20).amin(1) < 0.25).all()
    assert torch.equal(m.asked.c, world.c)


def test_equal_estimators_give_no_gradient_whatever_the_noise():
    world = ac_dmd(matching=matching(guidance_scale=1.0))
    world.make_equal("teacher", "fake_score")
    _, steps = world.update()
    near(steps[0].gradient, {"gain": torch.tensor(0.0), "shift": torch.zeros(SHAPE)})


def test_one_step_without_consistency_is_dmd():
    """With one step ``s`` is 0: the transition is the sample, and the fake score's loss is flow matching."""
    own = matching(renoise_distribution=Uniform(0.35, 0.98))
    found = []
    for method, options in ((DMD, {}), (ACDMD, {"consistency": Consistency(weight=0.0), "sampler": CPS()})):
        world = World(method, matching=own, steps=1, **options)
        found.append([step.gradient for step in world.update()[1]])
    near(*found, rtol=1e-9)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    near(*([step.gradient for step in ac_dmd(micro_batch_size=size).update()[1]] for size in (None, 3)))


# The fake score's steps.


def turns(world: World, weight: float):
    """The questions of each turn: at ``x_t``, and after two transitions down where there is a consistency term."""
    asked = world.questions("fake_score", learning=True)
    size = 3 if weight else 1
    return [asked[k : k + size] for k in range(0, len(asked), size)]


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_fake_score_gradient_is_the_closed_form(weight):
    world = ac_dmd(consistency=Consistency(weight, 0.3))
    m = Matched(world, 0.4)
    for turn, found in zip(turns(world, weight), m.steps[1:], strict=True):
        t, s = turn[0].sigma, m.s
        a, q = m.coefficients(t)
        eps = (turn[0].x - column(a) * m.x_s) / column(q)
        h = world.x0("fake_score", turn[0].x, t, world.c)
        v = (turn[0].x - h) / column(t)
        u = -m.x_s / column(1 - s) + column((t + (1 - t) * s**2 / (1 - s) ** 2) / q) * eps
        scale = (10 * q**2).clamp(max=1.0)
        d_h = -2 * column(scale / t) * (v - u)
        ends = [world.x0("fake_score", p.x, p.sigma, world.c) for p in turn[1:]]
        if weight:
            d_h = d_h - weight * (ends[0] + ends[1] - 2 * h)
        expected = world.pull_back("fake_score", t, world.c, d_h / h.numel())
        for k, p in enumerate(turn[1:]):
            part = world.pull_back("fake_score", p.sigma, p.c, weight * (ends[1 - k] - h) / h.numel())
            expected = {name: expected[name] + part[name] for name in expected}
        near(found.gradient, expected, rtol=1e-5)


def test_fake_scores_error_is_that_of_the_networks_own_prediction():
    """Each sample alone, since the factor is that of its level."""
    gradients = []
    for weight in (None, lambda sigma: (1 - sigma) ** 2):
        world = ac_dmd(prompts=1, each=1, consistency=Consistency(0.0))
        if weight is not None:
            world.module.family.error_weight = weight
        _, steps = world.update()
        gradients.append([step.gradient for step in steps if step.role == "fake_score"])
    levels = [q.sigma for q in world.questions("fake_score", learning=True)]
    for level, plain, weighted in zip(levels, *gradients, strict=True):
        near(weighted, {name: (1 - float(level)) ** 2 * value for name, value in plain.items()}, rtol=1e-6)


def test_fake_score_learns_from_transitions_under_standard_normal_noise():
    world = ac_dmd(each=50)
    m = Matched(world, 0.4)
    for turn in turns(world, 0.01):
        a, q = m.coefficients(turn[0].sigma)
        eps = (turn[0].x - column(a) * m.x_s) / column(q)
        assert abs(float(eps.std()) - 1) < 0.05
        assert abs(float(eps.mean())) < 0.05


def test_consistency_compares_two_transitions_down_with_independent_noise():
    world = ac_dmd(each=50, consistency=Consistency(0.5, 0.3))
    m = Matched(world, 0.4)
    for start, one, other in turns(world, 0.5):
        assert torch.equal(one.sigma, other.sigma)
        assert (one.sigma >= 1e-3).all()
        down = start.sigma - one.sigma
        assert (down <= 0.3 + 1e-6).all()
        assert down.max() > 0.28
        assert down.min() < 0.03
        h = world.x0("fake_score", start.x, start.sigma, m.world.c)
        rest = step(start.x, h, start.sigma, one.sigma, 0, 0.4)
        angle = 0.4 * math.pi / 2
        noises = [((p.x - rest) / column(p.sigma) / math.sin(angle)).flatten() for p in (one, other)]
        for noise in noises:
            assert abs(float(noise.std()) - 1) < 0.05
        assert abs(float(torch.corrcoef(torch.stack(noises))[0, 1])) < 0.1


def test_every_turn_has_its_own_levels():
    world = ac_dmd()
    world.update()
    one, two = turns(world, 0.01)
    assert not torch.allclose(one[0].sigma, two[0].sigma)
    assert not torch.allclose(one[0].sigma - one[1].sigma, two[0].sigma - two[1].sigma)


def test_fake_score_learns_at_levels_of_its_own_distribution():
    own = matching(renoise_distribution=Uniform(0.8, 0.9), fake_score_renoise_distribution=Uniform(0.9, 0.95))
    world = ac_dmd(matching=own)
    world.update()
    for turn in turns(world, 0.01):
        assert 0.9 <= turn[0].sigma.min() <= turn[0].sigma.max() <= 0.95


def test_fresh_transitions_are_new_ones_of_the_generator():
    world = ac_dmd(matching=matching(fake_score_samples="fresh"))
    m = Matched(world, 0.4)
    world.module.updates -= 1  # its streams are those of the update again
    first = [k for k, q in enumerate(world.asked) if q.learner == "fake_score"][::3]
    assert len(first) == 2
    for turn, k in enumerate(first):
        state, asked = world.asked[k - 1], world.asked[k]
        assert (state.role, state.gradient) == ("generator", False)
        assert not torch.allclose(state.x, m.state.x)
        m.s = torch.tensor([0.8, 0.6, 0.4, 0.0])[((1 - state.sigma) / 0.2).round().long()]
        x0 = world.x0("generator", state.x, state.sigma, world.c)
        noise = draw_noise(tuple(x0.shape), world.module.stream(f"critic transition {turn}"), x0.device)
        x_s = step(state.x, x0, state.sigma, m.s, noise, 0.4)
        rng = world.module.stream("critic", turn)
        draw_uniform((len(x0), 1), rng)
        eps = draw_noise(tuple(x0.shape), rng, x0.device)
        a, q = m.coefficients(asked.sigma)
        near(asked.x, column(a) * x_s + column(q) * eps)


def test_logs_are_the_closed_form_figures():
    world = ac_dmd(consistency=Consistency(0.5))
    m = Matched(world, 0.4)
    near(m.done.logs["loss"], (0.5 * (m.fake - m.real).square().mean((1, 2, 3)) / m.n).mean())
    matched = m.done.logs["fake_score_loss"] + 0.5 * m.done.logs["consistency_loss"]
    near(matched, (m.steps[1].losses[0] + m.steps[2].losses[0]) / 2)
    consistency = []
    for start, one, other in turns(world, 0.5):
        h, h_1, h_2 = (world.x0("fake_score", p.x, p.sigma, world.c) for p in (start, one, other))
        consistency.append(((h_1 - h) * (h_2 - h)).mean())
    near(m.done.logs["consistency_loss"], sum(consistency) / 2)


# Settings without a meaning.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"matching": Matching()}, r"model\.matching: interval is 'whole' and guidance_levels 'shared'"),
        ({"matching": matching(guidance_levels="above")}, r"interval is 'step' and guidance_levels 'above'"),
        ({"sampler": SDE()}, r"model\.sampler: SDE steps are for many steps"),
        ({"sampler": ODE()}, r"model\.sampler: ODE is deterministic"),
    ],
)
def test_refuses_what_has_no_meaning(options, said):
    with pytest.raises(UserError, match=said):
        World(ACDMD, **{"matching": matching(), **options})


def test_refuses_levels_that_end_below_the_first_step():
    with pytest.raises(UserError, match=r"its highest level 0\.8 is not above 0\.8, where the first step ends"):
        ac_dmd(matching=matching(renoise_distribution=Uniform(0.1, 0.8)))


@pytest.mark.parametrize("wrong", [{"weight": -1.0}, {"reach": 0.0}, {"reach": 1.5}])
def test_consistency_refuses_numbers_out_of_range(wrong):
    with pytest.raises(UserError, match=r"Consistency\.(weight|reach): it is"):
        Consistency(**wrong)
