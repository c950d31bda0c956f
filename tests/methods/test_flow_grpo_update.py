"""One update of Flow-GRPO in the world that is known in closed form."""

import math

import pytest
import tiny
import torch
from closed_forms import Rollout, advantages_of, check_shared_noise, column, grpo_gradient
from world import GaussianFamily, Liking, World, near

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.grpo_terms import GRPO
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.samplers import CPS, ODE, SDE, Renoise

pytestmark = pytest.mark.usefixtures("float64")


def flow_grpo(**options) -> World:
    return World(FlowGRPO, **{"reward": Liking(), "steps": 4, "each": 4, **options})


def trained_steps(world: World) -> list[int]:
    sigmas = world.module.sigmas.tolist()
    return [sigmas.index(float(q.sigma[0])) for q in world.questions("generator", learning=True)]


@pytest.mark.parametrize("kl_weight", [0.0, 0.04, 3.0])
@pytest.mark.parametrize("sampler", [SDE(0.7), CPS(0.9), Renoise()], ids=lambda s: type(s).__name__)
def test_generator_gradient_is_the_closed_form(sampler, kl_weight):
    world = flow_grpo(grpo=GRPO(sampler), kl_weight=kl_weight)
    _, steps = world.update()
    advantages = advantages_of(Rollout(world).rewards, 4)
    near(steps[0].gradient, grpo_gradient(Rollout(world), advantages, kl_weight), rtol=1e-5)


def test_divergence_may_be_from_the_generator_of_the_start():
    world = flow_grpo(kl_weight=3.0, kl_reference="start")
    _, steps = world.update()
    rollout = Rollout(world)
    near(steps[0].gradient, grpo_gradient(rollout, advantages_of(rollout.rewards, 4), 3.0), rtol=1e-5)
    assert world.questions("teacher") == []


def test_divergence_may_be_from_the_guided_teacher():
    world = flow_grpo(kl_weight=3.0, kl_guidance_scale=2.0)
    _, steps = world.update()
    rollout = Rollout(world)
    near(steps[0].gradient, grpo_gradient(rollout, advantages_of(rollout.rewards, 4), 3.0), rtol=1e-5)
    assert {question.guidance_scale for question in world.questions("teacher")} == {2.0}


def test_squared_errors_replace_log_probabilities_where_asked():
    world = flow_grpo(grpo=GRPO(CPS(0.9), log_prob="squared_error"), kl_weight=0.0)
    _, steps = world.update()
    near(steps[0].gradient, grpo_gradient(Rollout(world), advantages_of(Rollout(world).rewards, 4)), rtol=1e-5)


def test_advantages_are_clipped():
    world = flow_grpo(grpo=GRPO(advantage_clip=0.5), kl_weight=0.0)
    _, steps = world.update()
    advantages = advantages_of(Rollout(world).rewards, 4)
    assert (advantages.abs() > 0.5).any()
    near(steps[0].gradient, grpo_gradient(Rollout(world), advantages.clamp(-0.5, 0.5)), rtol=1e-5)


def test_second_epoch_is_on_the_same_rollouts_and_drops_what_is_beyond_the_clip():
    world = flow_grpo(grpo=GRPO(clip=1e-3), kl_weight=0.0, inner_epochs=2, steps=2)
    _, steps = world.update(rate=0.02)
    r, advantages = Rollout(world), advantages_of(Rollout(world).rewards, 4)
    near(steps[0].gradient, grpo_gradient(Rollout(world), advantages, steps=(0,)), rtol=1e-5)
    network = world.roles.standalone("generator")
    between = {n: p - 0.02 * steps[0].gradient[n] for n, p in world.start["generator"].named_parameters()}
    network.load_state_dict(between, strict=False)
    before, std, slope, led_to = r.step(0)
    after = r.step(0, now=True)[0]
    ratio = torch.exp((((led_to - before) ** 2 - (led_to - after) ** 2) / (2 * std**2)).mean((1, 2, 3)))
    beyond = ((ratio - 1) * advantages.sign()) > 1e-3
    assert 0 < beyond.sum() < len(beyond)
    weight = torch.where(beyond, 0.0, advantages * ratio)
    d_mean = -column(weight) * (led_to - after) / std**2 / after.numel()
    near(steps[1].gradient, r.pull_back(0, d_mean, slope), rtol=1e-5)


def test_one_step_makes_better_samples_likelier():
    world = flow_grpo(kl_weight=0.0)
    world.update(rate=0.01)
    r = Rollout(world)
    advantages = advantages_of(r.rewards, 4)
    gain = 0.0
    for k in range(3):
        before, std, _, led_to = r.step(k)
        after = r.step(k, now=True)[0]
        gain += (advantages * ((led_to - before) ** 2 - (led_to - after) ** 2).mean((1, 2, 3)) / std**2).sum()
    assert gain > 0


def test_a_flat_reward_moves_the_generator_toward_the_teacher_only():
    world = flow_grpo(reward=Liking(strength=0.0), kl_weight=0.5)
    _, steps = world.update()
    near(steps[0].gradient, grpo_gradient(Rollout(world), torch.zeros(12), 0.5), rtol=1e-5)


def test_a_flat_reward_without_kl_changes_nothing():
    _, steps = flow_grpo(reward=Liking(strength=0.0), kl_weight=0.0).update()
    assert all((value == 0).all() for value in steps[0].gradient.values())


@pytest.mark.parametrize(("train_steps", "expected"), [(None, 3), (3, 3), (2, 2), (1, 1)])
def test_a_subset_of_the_stochastic_steps_is_trained(train_steps, expected):
    world = flow_grpo(grpo=GRPO(train_steps=train_steps))
    seen = set()
    for _ in range(8):
        world.update()
        steps = trained_steps(world)
        assert len(steps) == len(set(steps)) == expected
        check_shared_noise(Rollout(world), steps, 4)
        seen |= set(steps)
    assert seen == {0, 1, 2}


def test_teacher_is_asked_at_the_trained_steps_without_guidance_and_without_gradient():
    world = flow_grpo()
    world.update()
    trained, base = world.questions("generator", learning=True), world.questions("teacher")
    assert [q.x.shape for q in base] == [q.x.shape for q in trained]
    for one, other in zip(base, trained, strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.c, other.c)
        assert one.guidance_scale == 1.0
        assert not one.gradient


def test_without_kl_the_teacher_is_not_asked():
    world = flow_grpo(kl_weight=0.0)
    world.update()
    assert world.questions("teacher") == []


def test_reward_scores_decoded_samples_once_under_their_prompts():
    world = flow_grpo(inner_epochs=3)
    world.update()
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(Rollout(world).x0))
    assert prompts == world.batch.prompts


@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_logs_are_the_closed_form_figures(kl_weight):
    world = flow_grpo(kl_weight=kl_weight, inner_epochs=2)
    done, _ = world.update()
    r = Rollout(world)
    zero = torch.tensor(0.0)
    expected = {"reward_sample": r.rewards.mean(), "sample_std": r.x0.std(), "clipped": zero}
    expected |= {"groups_without_spread": zero, "advantage_clipped": zero}
    kl = sum(((r.step(k)[0] - r.step(k, "teacher")[0]) ** 2).mean() / (2 * r.step(k)[1] ** 2) for k in range(3)) / 3
    # At ratio 1 the policy's loss is minus the mean advantage, which is 0.
    expected |= {"kl": kl, "loss": kl_weight * kl} if kl_weight else {"loss": zero}
    assert done.logs.keys() == expected.keys()
    near(done.logs, expected, rtol=1e-5, atol=1e-7)


def test_average_follows_every_inner_epoch():
    world = flow_grpo(ema_decay=0.5, inner_epochs=2)
    before = world.weights("ema")
    _, steps = world.update(rate=0.1)
    assert [step.role for step in steps] == ["generator", "generator"]
    start = dict(world.start["generator"].named_parameters())
    for name in before:
        one = start[name] - 0.1 * steps[0].gradient[name]
        near(world.weights("ema")[name], 0.25 * before[name] + 0.25 * one + 0.5 * world.weights("generator")[name])


# Several rewards.


class Redness(Liking):
    """Another taste: the first color alone, on a far larger scale."""

    def score(self, images, prompts):
        return 1000 * images[:, 0].mean((1, 2))


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_separately_normalized_rewards_do_not_decide_by_their_scale(spread):
    reward = CombinedReward([Liking(), Redness()], [1.0, 2.0])
    world = flow_grpo(reward=reward, sample_advantages=SampleAdvantages(spread, "separately"), kl_weight=0.0)
    done, steps = world.update()
    r = Rollout(world)
    red = 1000 * GaussianFamily().decode(r.x0)[:, 0].mean((1, 2))
    total = torch.zeros(12)
    for weight, rewards in ((1.0, r.rewards), (2.0, red)):
        groups = rewards.view(3, 4)
        centered = groups - groups.mean(1, keepdim=True)
        size = centered.square().mean(1, keepdim=True).sqrt() if spread == "group" else centered.square().mean().sqrt()
        total += weight * (centered / size).flatten()
    advantages = total / total.square().mean().sqrt()
    near(steps[0].gradient, grpo_gradient(Rollout(world), advantages), rtol=1e-4)
    near(done.logs["reward_sample"], (r.rewards + 2 * red).mean(), rtol=1e-5)


def test_jointly_normalized_rewards_are_summed_first():
    reward = CombinedReward([Liking(), Redness()], [1.0, 2.0])
    world = flow_grpo(reward=reward, kl_weight=0.0)
    _, steps = world.update()
    r = Rollout(world)
    red = 1000 * GaussianFamily().decode(r.x0)[:, 0].mean((1, 2))
    near(steps[0].gradient, grpo_gradient(Rollout(world), advantages_of(r.rewards + 2 * red, 4)), rtol=1e-4)


def test_spread_reaches_the_advantages():
    world = flow_grpo(sample_advantages=SampleAdvantages("none"), kl_weight=0.0)
    _, steps = world.update()
    rewards = Rollout(world).rewards.view(3, 4)
    near(
        steps[0].gradient, grpo_gradient(Rollout(world), (rewards - rewards.mean(1, keepdim=True)).flatten()), rtol=1e-5
    )


# Bad settings.


@pytest.mark.parametrize("sampler", [ODE(), CPS(0.0)], ids=["ode", "cps"])
def test_a_sampler_without_noise_is_refused(sampler):
    with pytest.raises(UserError, match=r"model\.grpo\.sampler: .* draws no noise"):
        GRPO(sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grpo": GRPO(train_steps=4)}, r"model\.grpo\.train_steps: it is 4, but 3 of the generator's 4 steps"),
        ({"steps": 1}, r"model\.steps: it is 1, but the last step is deterministic"),
        ({"kl_weight": -0.1}, r"FlowGRPO\.kl_weight: it is -0\.1"),
        ({"kl_weight": math.nan}, r"FlowGRPO\.kl_weight: it is nan"),
        ({"inner_epochs": 0}, r"FlowGRPO\.inner_epochs: it is 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        flow_grpo(**options)


@pytest.mark.parametrize("options", [{"clip": 0.0}, {"clip": math.nan}, {"advantage_clip": -1.0}])
def test_impossible_clips_are_refused(options):
    with pytest.raises(UserError, match=rf"GRPO\.{next(iter(options))}: it is"):
        GRPO(**options)


def test_one_sample_per_prompt_is_refused_before_the_teacher_is_loaded(tiny_pipeline, monkeypatch):
    torch.set_default_dtype(torch.float32)
    module = tiny.module(tiny_pipeline, FlowGRPO, reward=tiny.Brightness(), steps=2)
    monkeypatch.setattr(module.family, "load", lambda: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"data\.group_size: it is 1, but FlowGRPO compares"):
        tiny.train(module, 1, data={"batch_size": 4, "group_size": 1})
