"""One update of DiffusionNFT in the world that is known in closed form."""

import math
from itertools import pairwise

import pytest
import torch
from closed_forms import JudgedByOld, column
from world import GaussianFamily, Liking, World, near, noise_in

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.nft_terms import NFT, DecayRamp

pytestmark = pytest.mark.usefixtures("float64")


def nft(**options) -> World:
    return World(DiffusionNFT, **{"reward": Liking(), "steps": 3, "each": 4, **options})


@pytest.mark.parametrize("kl_weight", [0.0, 1e-4, 2.0])
@pytest.mark.parametrize("settings", [NFT(), NFT(beta=0.1), NFT(advantage_clip=0.8)])
def test_generator_gradient_is_the_closed_form(settings, kl_weight):
    world = nft(nft=settings, kl_weight=kl_weight)
    _, steps = world.update()
    near(steps[0].gradient, JudgedByOld(world).gradient(kl_weight), rtol=1e-5)


def test_second_epoch_is_on_the_same_judged_samples_with_noise_of_its_own():
    world = nft(kl_weight=0.5, inner_epochs=2)
    done, steps = world.update(rate=0.02)
    assert [step.role for step in steps] == ["generator", "generator"]
    assert len(world.module.judge.reward.asked) == 1
    asked = world.questions("generator", learning=True)
    first, second = JudgedByOld(world, asked[:3]), JudgedByOld(world, asked[3:])
    assert not any(torch.equal(q.x, p.x) for q in asked[:3] for p in asked[3:])
    near(steps[0].gradient, first.gradient(0.5), rtol=1e-5)
    between = world.start["generator"].state_dict()
    between |= {name: between[name] - 0.02 * gradient for name, gradient in steps[0].gradient.items()}
    world.start["generator"].load_state_dict(between)
    near(steps[1].gradient, second.gradient(0.5), rtol=1e-5)
    near(done.logs["loss"], torch.stack([loss for step in steps for loss in step.losses]).sum() / 2, rtol=1e-5)


def test_every_epoch_draws_its_levels_again():
    world = nft(nft=NFT(train_steps=1), prompts=5, inner_epochs=3)
    world.update()
    levels = torch.stack([q.sigma for q in world.questions("generator", learning=True)])
    assert levels.shape == (3, 20)
    assert not any(torch.equal(one, other) for one, other in pairwise(levels))


def test_first_of_several_epochs_is_the_update_of_one():
    one, three = (nft(inner_epochs=epochs).update()[1][0].gradient for epochs in (1, 3))
    near(three, one, rtol=0, atol=0)


def test_generator_moves_toward_better_samples():
    world = nft(kl_weight=0.0)
    world.make_equal("old", "generator")
    world.update(rate=1e-3)
    j = JudgedByOld(world)
    gain = 0.0
    for q in j.trained:
        before, after = (world.x0("generator", q.x, q.sigma, q.c, now=now) for now in (False, True))
        closer = (before - j.x0).abs().mean((1, 2, 3)) - (after - j.x0).abs().mean((1, 2, 3))
        gain += (j.advantages * closer).sum()
    assert gain > 0


def test_rollouts_are_the_old_policys():
    world = nft()
    world.update()
    assert world.questions("generator", learning=False) == []
    rollouts = world.questions("old")[:3]
    assert [float(q.sigma[0]) for q in rollouts] == world.module.sigmas[:3].tolist()
    for one, other in pairwise(rollouts):
        v = (one.x - world.x0("old", one.x, one.sigma, one.c)) / column(one.sigma)
        near(other.x, one.x + column(other.sigma - one.sigma) * v)


@pytest.mark.parametrize(("train_steps", "expected"), [(None, 3), (3, 3), (2, 2), (1, 1)])
def test_every_sample_is_renoised_to_different_levels(train_steps, expected):
    world = nft(nft=NFT(train_steps=train_steps), prompts=5)
    world.update()
    j = JudgedByOld(world)
    levels = torch.stack([q.sigma for q in j.trained], dim=1)
    assert levels.shape == (20, expected)
    assert all(len(row.unique()) == expected for row in levels)
    assert set(levels.flatten().tolist()) == set(world.module.sigmas[:3].tolist())
    if expected < 3:
        assert len({tuple(sorted(row.tolist())) for row in levels}) > 1


def test_every_level_has_noise_of_its_own():
    world = nft(prompts=5, each=4)
    world.update()
    j = JudgedByOld(world)
    noise = torch.stack([noise_in(q, j.x0).flatten() for q in j.trained])
    assert abs(float(noise.std()) - 1) < 0.1
    assert (torch.corrcoef(noise) - torch.eye(3)).abs().max() < 0.25


def test_policies_and_base_are_asked_at_the_same_renoised_samples():
    world = nft(kl_weight=1.0)
    world.update()
    trained, old, base = world.questions("generator"), world.questions("old")[3:], world.questions("teacher")
    for one, two, three in zip(trained, old, base, strict=True):
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.x, three.x)
        assert torch.equal(one.sigma, two.sigma)
        assert torch.equal(one.sigma, three.sigma)
        assert torch.equal(one.c, world.c)
        assert torch.equal(three.c, world.c)
        assert (three.guidance_scale, two.gradient, three.gradient) == (1.0, False, False)


def test_distance_may_be_from_the_generator_of_the_start():
    world = nft(kl_weight=2.0, kl_reference="start")
    _, steps = world.update()
    near(steps[0].gradient, JudgedByOld(world).gradient(2.0), rtol=1e-5)
    assert world.questions("teacher") == []
    assert not any(question.gradient for question in world.questions("reference"))


def test_distance_may_be_from_the_guided_teacher():
    world = nft(kl_weight=2.0, kl_guidance_scale=3.0)
    _, steps = world.update()
    near(steps[0].gradient, JudgedByOld(world).gradient(2.0), rtol=1e-5)
    assert {question.guidance_scale for question in world.questions("teacher")} == {3.0}


def test_reference_stays_where_the_run_began():
    world = nft(kl_weight=2.0, kl_reference="start")
    before = world.weights("reference")
    for _ in range(2):
        world.update(rate=0.1)
    after = world.weights("reference")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_reference_has_a_copy_only_where_it_is_the_start():
    assert [spec.name for spec in nft(kl_weight=2.0).module.role_specs()] == ["generator", "ema", "old"]


def test_without_kl_the_teacher_is_not_asked():
    world = nft(kl_weight=0.0)
    world.update()
    assert world.questions("teacher") == []


def test_reward_scores_decoded_samples_under_their_prompts():
    world = nft()
    world.update()
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(JudgedByOld(world).x0))
    assert prompts == world.batch.prompts


def test_spread_reaches_the_advantages():
    one, other = (nft(sample_advantages=SampleAdvantages(spread)).update()[1] for spread in ("batch", "group"))
    assert not torch.allclose(one[0].gradient["gain"], other[0].gradient["gain"])


def test_logs_are_the_closed_form_figures():
    world = nft(kl_weight=0.5)
    done, _ = world.update()
    j = JudgedByOld(world)
    loss, kl = [], []
    for q in j.trained:
        x, old, base = (world.x0(role, q.x, q.sigma, q.c) for role in ("generator", "old", "teacher"))
        errors = [x - j.x0, 2 * old - x - j.x0]
        toward, away = ((e.square().mean((1, 2, 3)) / e.abs().mean((1, 2, 3))) for e in errors)
        kl.append(((x - base) / column(q.sigma)).square().mean())
        loss.append(5 * (j.o * toward + (1 - j.o) * away).mean() + 0.5 * kl[-1])
    expected = {
        "loss": torch.stack(loss).mean(),
        "kl": torch.stack(kl).mean(),
        "reward_sample": j.rewards.mean(),
        "sample_std": j.x0.std(),
        "groups_without_spread": torch.tensor(0.0),
        "advantage_clipped": torch.tensor(0.0),
    }
    assert done.logs.keys() == expected.keys()
    near(done.logs, expected, rtol=1e-5)


# The old policy.


def test_old_policy_is_the_generator_after_the_first_update():
    world = nft()
    world.update(rate=0.1)
    near(world.weights("old"), world.weights("generator"), rtol=1e-12)


@pytest.mark.parametrize(("ramp", "decay"), [(DecayRamp(), 0.2), (DecayRamp(limit=0.15), 0.15)])
def test_old_policy_moves_with_the_updates_decay_after_the_generators_step(ramp, decay):
    world = nft(nft=NFT(old_decay=ramp))
    world.module.updates = 200
    before = world.weights("old")
    world.update(rate=0.1)
    after = world.weights("generator")
    near(world.weights("old"), {name: decay * before[name] + (1 - decay) * after[name] for name in after})


@pytest.mark.parametrize(
    ("ramp", "expected"),
    [
        (DecayRamp(), {0: 0.0, 1: 0.001, 499: 0.499, 500: 0.5, 10_000: 0.5}),
        (DecayRamp(0.0075, 0.999, 75), {0: 0.0, 75: 0.0, 76: 0.0075, 115: 0.3, 1000: 0.999}),
    ],
)
def test_decay_ramp_rises_to_its_limit(ramp, expected):
    assert {update: round(ramp(update), 9) for update in expected} == expected


# Bad settings.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nft(nft=NFT(train_steps=4)), r"model\.nft\.train_steps: it is 4, but the generator has 3 steps"),
        (lambda: nft(nft=NFT(train_steps=0)), r"NFT\.train_steps: it is 0"),
        (
            lambda: nft(kl_weight=0.0, kl_reference="start"),
            r"DiffusionNFT\.kl_reference: it is start, but kl_weight is 0",
        ),
        (
            lambda: nft(kl_weight=0.0, kl_guidance_scale=3.0),
            r"DiffusionNFT\.kl_guidance_scale: it is 3\.0, but kl_weight is 0; give a weight",
        ),
        (
            lambda: nft(kl_weight=0.1, kl_reference="start", kl_guidance_scale=3.0),
            r"DiffusionNFT\.kl_guidance_scale: it is 3\.0, but kl_reference is start; a distilled start needs no",
        ),
        (lambda: nft(kl_weight=-1.0), r"DiffusionNFT\.kl_weight: it is -1\.0"),
        (lambda: NFT(beta=0.0), r"NFT\.beta: it is 0\.0"),
        (lambda: NFT(advantage_clip=math.nan), r"NFT\.advantage_clip: it is nan"),
        (lambda: DecayRamp(limit=1.0), r"DecayRamp\.limit: it is 1\.0"),
        (lambda: DecayRamp(slope=-0.1), r"DecayRamp\.slope: it is -0\.1"),
        (lambda: DecayRamp(start=-1), r"DecayRamp\.start: it is -1"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_samples_of_a_prompt_are_compared():
    assert DiffusionNFT.needs_groups
