"""Decoupled DMD: the teacher's guidance at levels of its own, in the world that is known in closed form."""

from dataclasses import replace

import pytest
import torch
from world import Liking, World, near, noise_in

from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.schedules import Uniform

pytestmark = pytest.mark.usefixtures("float64")


def decoupled(levels="above", **options) -> World:
    matching = Matching(guidance_scale=2.5, guidance_levels=levels, **options.pop("matching", {}))
    return World(DMD, matching=matching, **options)


def sample(world: World):
    (state,) = world.questions("generator", learning=True)
    return state, world.x0("generator", state.x, state.sigma, state.c)


@pytest.mark.parametrize("levels", ["above", "all"])
def test_generator_gradient_is_the_closed_form(levels):
    world = decoupled(levels)
    _, steps = world.update()
    state, x = sample(world)
    (plain,), (guided,) = world.questions("teacher"), world.questions("teacher guidance")
    (asked,) = world.questions("fake_score", inside="generator")
    fake = world.x0("fake_score", asked.x, asked.sigma, asked.c)
    real = world.x0("teacher", plain.x, plain.sigma, plain.c)
    ends = (world.x0("teacher", guided.x, guided.sigma, guided.c, scale) for scale in (2.5, 1.0))
    augmentation = next(ends) - next(ends)
    n = (x - real - augmentation).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3)
    expected = world.pull_back("generator", state.sigma, state.c, (fake - real - augmentation) / n / x.numel())
    near(steps[0].gradient, expected)


def test_equal_levels_give_the_gradient_of_dmd():
    one, other = (World(DMD, matching=Matching(guidance_scale=2.5)) for _ in range(2))
    draw = other.module.draw_renoise
    other.module.draw_renoise = lambda state: replace(draw(state), guidance_sigma=draw(state).sigma)
    near(*(world.update()[1][0].gradient for world in (one, other)), rtol=1e-10)
    assert other.questions("teacher guidance")
    assert not one.questions("teacher guidance")


def test_matching_draws_are_those_of_dmd():
    one, other = World(DMD, matching=Matching(guidance_scale=2.5)), decoupled()
    for world in (one, other):
        world.update()
    assert torch.equal(one.questions("teacher")[0].x, other.questions("teacher")[0].x)


def test_guidance_is_above_the_level_at_which_the_step_starts():
    world = decoupled(prompts=4, each=40, matching={"renoise_distribution": Uniform(0.0, 1.0)})
    world.update()
    state, _ = sample(world)
    (guided,) = world.questions("teacher guidance")
    assert (guided.sigma >= state.sigma - 1e-6).all()
    for start in (0.4, 0.6, 0.8):
        levels = guided.sigma[(state.sigma - start).abs() < 1e-6]
        assert levels.min() < start + 0.1
        assert levels.max() > 0.9
    (plain,) = world.questions("teacher")
    assert (plain.sigma < state.sigma).any()


def test_guidance_at_all_levels_has_its_own_draw():
    world = decoupled("all", prompts=4, each=40)
    world.update()
    (plain,), (guided,) = world.questions("teacher"), world.questions("teacher guidance")
    assert guided.sigma.min() < 0.1
    assert abs(float(torch.corrcoef(torch.stack([plain.sigma, guided.sigma]))[0, 1])) < 0.2


def test_both_parts_see_the_same_sample_noise_and_prompt():
    world = decoupled()
    world.update()
    _, x = sample(world)
    (plain,), (guided,) = world.questions("teacher"), world.questions("teacher guidance")
    near(noise_in(guided, x), noise_in(plain, x))
    assert torch.equal(plain.c, guided.c)
    assert (plain.guidance_scale, guided.guidance_scale) == (1.0, 2.5)


def test_without_guidance_nothing_is_drawn():
    world = World(DMD, matching=Matching(guidance_scale=1.0, guidance_levels="above"))
    world.update()
    assert not world.questions("teacher guidance")


def test_groups_of_targets_each_have_their_own_guidance_level():
    matching = Matching(guidance_scale=2.5, guidance_levels="all", renoise_distribution=Uniform(0.0, 1.0))
    world = World(GDMD, reward=Liking(), targets=TargetGroup(4), matching=matching)
    world.update()
    (guided,) = world.questions("teacher guidance")
    assert (torch.arange(4) == (guided.sigma.view(-1, 4) * 4).long()).all()


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    near(*(decoupled(micro_batch_size=size).update()[1][0].gradient for size in (None, 4)))
