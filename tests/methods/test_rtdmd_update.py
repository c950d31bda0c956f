"""One update of RTDMD in the world that is known in closed form: SubGRPO, and both terms of the last step."""

from dataclasses import replace

import pytest
import tiny
import torch
from closed_forms import Rollout, advantages_of, check_shared_noise, column, grpo_gradient
from world import GaussianFamily, Liking, World, liking, near

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.base import State
from gdmd_lightning.methods.grpo_terms import GRPO
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.methods.settings import Consistency, Matching
from gdmd_lightning.samplers import CPS, SDE

pytestmark = pytest.mark.usefixtures("float64")

SUB = GRPO(CPS(0.9), clip=1e-5, log_prob="squared_error", train_steps=2)


def matching(**options) -> Matching:
    return Matching(**{"guidance_scale": 2.5, "interval": "step", "fake_score_updates": 1, **options})


def rtdmd(**options) -> World:
    options = {"reward": Liking(), "matching": matching(), "grpo": SUB, "each": 4, **options}
    return World(RTDMD, **options)


def trained_steps(world: World) -> list[int]:
    sigmas = world.module.sigmas.tolist()
    return [sigmas.index(float(q.sigma[0])) for q in world.questions("generator", learning=True)]


def last_step_gradient(world: World, matching_weight: float, refl_weight: float, margin: float | None):
    """Of AC-DMD's loss, which at ``s = 0`` compares clean samples, and of the reward."""
    r = Rollout(world)
    (teacher,) = world.questions("teacher")
    (fake,) = world.questions("fake_score", inside="generator")
    real = world.x0("teacher", teacher.x, teacher.sigma, world.c, 2.5)
    n = (r.x0 - real).abs().mean((1, 2, 3))
    d_x0 = matching_weight * (world.x0("fake_score", fake.x, fake.sigma, world.c) - real) / column(n) / r.x0.numel()
    leaf = r.x0.clone().requires_grad_()
    rewards = liking(GaussianFamily().decode(leaf), world.batch.prompts)
    loss = -rewards.mean() if margin is None else (margin - rewards).clamp(min=0).mean()
    d_x0 = d_x0 + refl_weight * torch.autograd.grad(loss, leaf)[0]
    sigma = world.module.sigmas[-2].double().expand(len(r.x0))
    return world.pull_back("generator", sigma, world.c, d_x0)


@pytest.mark.parametrize("margin", [None, 0.5])
def test_generator_gradient_is_the_mean_over_the_two_policy_steps_and_the_last_one(margin):
    weights = {"grpo_weight": 0.7, "matching_weight": 0.3, "refl_weight": 0.2}
    world = rtdmd(margin=margin, **weights)
    done, steps = world.update()
    *chosen, last = trained_steps(world)
    assert len(chosen) == 2
    assert last == 3
    r = Rollout(world)
    if margin is not None:
        assert 0 < (r.rewards < margin).sum() < len(r.rewards)
    policy = grpo_gradient(r, advantages_of(r.rewards, 4), steps=tuple(chosen))
    rest = last_step_gradient(world, 0.3, 0.2, margin)
    near(steps[0].gradient, {name: (2 * 0.7 * policy[name] + rest[name]) / 3 for name in rest}, rtol=1e-5)
    near(done.logs["reward_sample"], r.rewards.mean(), rtol=1e-5)
    assert [step.role for step in steps] == ["generator", "fake_score"]


def test_rollouts_are_those_of_the_policys_sampler():
    one, other = rtdmd(), rtdmd(grpo=GRPO(SDE(0.7), train_steps=2))
    for world in (one, other):
        world.update()
    near(Rollout(one).states[0], Rollout(other).states[0])
    assert not torch.allclose(Rollout(one).states[1], Rollout(other).states[1])
    r = Rollout(other)
    near(other.questions("generator", learning=True)[-1].x, r.states[3])


def test_trained_steps_are_drawn_from_the_stochastic_ones():
    world = rtdmd()
    seen = set()
    for _ in range(20):
        world.update()
        seen.add(tuple(trained_steps(world)))
    assert seen == {(0, 1, 3), (0, 2, 3), (1, 2, 3)}


def test_samples_of_a_prompt_share_the_noise_of_steps_that_are_not_trained():
    for train_steps in (1, 2, 3):
        world = rtdmd(grpo=replace(SUB, train_steps=train_steps))
        world.update()
        check_shared_noise(Rollout(world), trained_steps(world)[:-1], 4)


def test_last_step_is_matched_at_renoised_samples_of_their_own_prompts():
    world = rtdmd(each=20)
    world.update()
    r = Rollout(world)
    (teacher,), (fake,) = world.questions("teacher"), world.questions("fake_score", inside="generator")
    assert torch.equal(teacher.x, fake.x)
    assert torch.equal(teacher.c, world.c)
    noise = (teacher.x - (1 - column(teacher.sigma)) * r.x0) / column(teacher.sigma)
    assert abs(float(noise.std()) - 1) < 0.05


def test_without_rewards_it_is_ac_dmd_of_the_last_step():
    world = rtdmd(grpo_weight=0.0, refl_weight=0.0, matching_weight=1.0)
    done, own = world.update()
    r = Rollout(world)
    assert trained_steps(world) == [3]
    assert world.module.judge.reward.asked == []
    assert "reward_sample" not in done.logs
    other = World(ACDMD, matching=matching(), each=4, sampler=CPS(0.9))
    last = torch.full((len(r.x0),), 3)
    latents = NoisyLatents(r.states[3], other.module.sigmas[last].to(r.x0), other.batch.conditioning)
    other.module.rollout_state = lambda batch: State(latents, last)
    _, theirs = other.update()
    near([step.gradient for step in own], [step.gradient for step in theirs], rtol=0, atol=0)


def test_fake_score_learns_from_the_rollouts_samples():
    world = rtdmd(consistency=Consistency(weight=0.0), each=20)
    world.update()
    r = Rollout(world)
    (asked,) = world.questions("fake_score", learning=True)
    noise = (asked.x - (1 - column(asked.sigma)) * r.x0) / column(asked.sigma)
    assert abs(float(noise.std()) - 1) < 0.05
    assert torch.equal(asked.c, world.c)


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    found = []
    for size in (None, 5):
        world = rtdmd(micro_batch_size=size, refl_weight=0.5, matching_weight=0.5)
        found.append([step.gradient for step in world.update()[1]])
    near(*found, rtol=1e-5)


# Settings without a meaning.


class Opaque(Liking):
    differentiable = False


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"reward": Opaque()}, r"model\.reward: 'liking' is not differentiable"),
        ({"steps": 2}, r"model\.grpo\.train_steps: it is 2, but 1 of the generator's 2 steps are stochastic"),
        ({"grpo_weight": -1.0}, r"RTDMD\.grpo_weight: it is -1\.0"),
        ({"matching_weight": -1.0}, r"RTDMD\.matching_weight: it is -1\.0"),
        ({"refl_weight": -1.0}, r"RTDMD\.refl_weight: it is -1\.0"),
        ({"matching": matching(fake_score_samples="fresh")}, r"fake_score_samples is 'fresh', but the fake score"),
        ({"matching": Matching()}, r"model\.matching: interval is 'whole'"),
    ],
)
def test_refuses_what_has_no_meaning(options, said):
    with pytest.raises(UserError, match=said):
        rtdmd(**options)


def test_a_reward_without_gradient_will_do_without_backpropagation():
    world = rtdmd(reward=Opaque(), refl_weight=0.0)
    done, _ = world.update()
    assert "refl_loss" not in done.logs


def test_single_samples_are_refused_only_where_they_are_compared(tiny_pipeline):
    module = tiny.module(tiny_pipeline, RTDMD, reward=tiny.Brightness())
    with pytest.raises(UserError, match=r"data\.group_size: it is 1, but RTDMD compares"):
        tiny.train(module, 1, data={"group_size": 1})
    assert not tiny.module(tiny_pipeline, RTDMD, reward=tiny.Brightness(), grpo_weight=0.0).needs_groups
