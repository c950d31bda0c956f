"""One update of DMDR in the world that is known in closed form: both terms, and the cold start."""

import math

import pytest
import tiny
import torch
from closed_forms import JudgedByOld, Rollout, advantages_of, check_shared_noise, column, grpo_gradient
from world import COLORS, GaussianFamily, Liking, World, liking, near

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.cold_start import ColdStart
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.grpo_terms import GRPO
from gdmd_lightning.methods.matching import RenoiseDraw
from gdmd_lightning.methods.nft_terms import NFT, DecayRamp
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.planning.footprint import plan
from gdmd_lightning.roles import LoRA
from gdmd_lightning.samplers import ODE, SDE
from gdmd_lightning.schedules import LogitNormal, Tilted, Uniform

pytestmark = pytest.mark.usefixtures("float64")
MATCHING = Matching(guidance_scale=2.5, fake_score_updates=2)
JOINTS = ("refl", "grpo", "nft")


def dmdr(method=DMDR, **options) -> World:
    options = {"matching": MATCHING, "each": 4, **options}
    return World(method, **({"reward": Liking()} if method is DMDR else {}) | options)


def without_reward(world: World) -> dict[str, torch.Tensor]:
    """The gradient of distribution matching alone, with the same draws."""
    other = dmdr(DMD)
    other.module.updates = world.module.updates - 1
    return other.update()[1][0].gradient


def sample(world: World):
    """The state of the matched samples, and the samples."""
    state = world.questions("generator", learning=True)[0]
    return state, world.x0("generator", state.x, state.sigma, state.c)


def rollouts_for_reward(world: World):
    return [q for q in world.questions("generator", learning=False) if q.learner == "generator"]


# The reward term.


@pytest.mark.parametrize("joint", JOINTS)
def test_reward_weight_zero_is_dmd_to_the_bit(joint):
    world, plain = dmdr(joint=joint, reward_weight=0.0), dmdr(DMD)
    for _ in range(2):
        steps, expected = world.update(rate=0.1)[1], plain.update(rate=0.1)[1]
        assert [step.role for step in steps] == [step.role for step in expected]
        for one, other in zip(steps, expected, strict=True):
            assert tiny.differing(one.gradient, other.gradient) == []
    for role in ("generator", "ema", "fake_score"):
        assert tiny.differing(world.weights(role), plain.weights(role)) == []
    assert world.module.judge.reward.asked == []


@pytest.mark.parametrize("joint", ["refl", "grpo"])
def test_a_flat_reward_gives_the_gradient_of_dmd(joint):
    world = dmdr(joint=joint, reward=Liking(strength=0.0), reward_weight=3.0)
    near(world.update()[1][0].gradient, without_reward(world), rtol=1e-12)


@pytest.mark.parametrize("weight", [0.05, 2.0])
def test_refl_adds_the_rewards_own_gradient_on_the_matched_samples(weight):
    world = dmdr(reward_weight=weight)
    _, steps = world.update()
    state, x = sample(world)
    taste = torch.tensor([1.0, 0.5, -0.25])[:, None, None] * torch.tensor([1.0, 0.2, -0.6]).expand(3, 2, 3)
    signs = torch.tensor([1.0 if c[0] > 0 else -1.0 for c in world.c])
    slope = 10 * column(signs) * torch.einsum("pc,phw->chw", COLORS, taste) / taste.numel()
    matching = without_reward(world)
    part = world.pull_back("generator", state.sigma, state.c, -weight * slope / len(x))
    near(steps[0].gradient, {name: matching[name] + part[name] for name in part}, rtol=1e-5)
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(x))
    assert prompts == world.batch.prompts


def test_refl_judges_each_micro_batch_with_its_own_prompts():
    world = dmdr(micro_batch_size=5)
    world.update()
    asked = world.module.judge.reward.asked
    assert [len(images) for images, _ in asked] == [5, 5, 2]
    assert [prompt for _, prompts in asked for prompt in prompts] == list(world.batch.prompts)


def test_refl_margin_drops_samples_that_are_good_enough():
    world = dmdr(margin=-1e6)
    near(world.update()[1][0].gradient, without_reward(world), rtol=1e-12)


def test_refl_needs_no_rollout_of_its_own():
    world = dmdr()
    world.update()
    assert rollouts_for_reward(world) == []


@pytest.mark.parametrize("weight", [0.05, 2.0])
def test_grpo_adds_the_policy_gradient_of_full_rollouts(weight):
    world = dmdr(joint="grpo", reward_weight=weight, grpo=GRPO(SDE(0.5)))
    _, steps = world.update()
    r = Rollout(world, rollouts_for_reward(world))
    part, matching = grpo_gradient(r, advantages_of(r.rewards, 4)), without_reward(world)
    near(steps[0].gradient, {name: matching[name] + weight * part[name] for name in part}, rtol=1e-5)
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(r.x0))
    assert prompts == world.batch.prompts


@pytest.mark.parametrize("weight", [0.05, 2.0])
def test_nft_adds_the_velocity_policies_on_the_old_policys_samples(weight):
    world = dmdr(joint="nft", reward_weight=weight, nft=NFT(beta=0.5))
    _, steps = world.update()
    j = JudgedByOld(world, world.questions("generator", learning=True)[1:])
    assert len(j.trained) == 4
    part, matching = j.gradient(), without_reward(world)
    near(steps[0].gradient, {name: matching[name] + weight * part[name] for name in part}, rtol=1e-5)
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(j.x0))
    assert prompts == world.batch.prompts


@pytest.mark.parametrize("joint", ["grpo", "nft"])
def test_a_subset_of_the_steps_is_trained(joint):
    settings = {"grpo": GRPO(train_steps=2)} if joint == "grpo" else {"nft": NFT(train_steps=2)}
    world = dmdr(joint=joint, **settings)
    world.update()
    assert len(world.questions("generator", learning=True)) == 3


def test_samples_of_a_prompt_share_the_noise_of_steps_that_are_not_trained():
    world = dmdr(joint="grpo", grpo=GRPO(train_steps=2))
    world.update()
    sigmas = world.module.sigmas.tolist()
    trained = [sigmas.index(float(q.sigma[0])) for q in world.questions("generator", learning=True)[1:]]
    check_shared_noise(Rollout(world, rollouts_for_reward(world)), trained, 4)


@pytest.mark.parametrize("joint", ["grpo", "nft"])
def test_rollouts_for_the_reward_have_noise_of_their_own(joint):
    world = dmdr(joint=joint)
    world.update()
    first = (rollouts_for_reward(world) if joint == "grpo" else world.questions("old"))[0]
    start = next(q for q in world.questions("generator") if float(q.sigma[0]) == 1.0)
    assert not torch.equal(first.x[: len(start.x)], start.x)


def test_old_policy_follows_with_its_ramp_after_the_step():
    world = dmdr(joint="nft", nft=NFT(old_decay=DecayRamp(slope=0.3)))
    world.module.updates = 1
    before = world.weights("old")
    world.update(rate=0.1)
    after = world.weights("generator")
    near(world.weights("old"), {name: 0.3 * before[name] + 0.7 * after[name] for name in after})


@pytest.mark.parametrize("joint", ["refl", "grpo"])
def test_only_nft_has_an_old_policy(joint):
    assert [spec.name for spec in dmdr(joint=joint).roles.specs] == ["generator", "ema", "fake_score"]


@pytest.mark.parametrize("joint", JOINTS)
def test_fake_score_learns_from_the_matched_samples_as_in_dmd(joint):
    world, plain = dmdr(joint=joint), dmdr(DMD)
    steps, expected = world.update()[1], plain.update()[1]
    assert [step.role for step in steps] == ["generator", "fake_score", "fake_score"]
    for one, other in zip(steps[1:], expected[1:], strict=True):
        assert tiny.differing(one.gradient, other.gradient) == []


@pytest.mark.parametrize("joint", JOINTS)
def test_logs_are_the_closed_form_figures(joint):
    world = dmdr(joint=joint, reward_weight=0.5)
    done, steps = world.update()
    plain = dmdr(DMD).update()[0].logs
    _, x = sample(world)
    expected = {name: plain[name] for name in ("gradient", "normalizer", "sample_std", "fake_score_loss", "loss")}
    if joint == "refl":
        reward = liking(GaussianFamily().decode(x), world.batch.prompts).mean()
        expected |= {"reward_sample": reward, "loss": plain["loss"] - 0.5 * reward}
    else:
        asked = world.questions("old")[3] if joint == "nft" else rollouts_for_reward(world)[3]
        x0 = world.x0(asked.role, asked.x, asked.sigma, asked.c)
        expected["reward_sample"] = liking(GaussianFamily().decode(x0), world.batch.prompts).mean()
        term = torch.stack(steps[0].losses[1:]).mean() / 0.5 * len(steps[0].losses[1:])
        zero = torch.tensor(0.0)
        expected |= {"reward_loss": term, "groups_without_spread": zero, "advantage_clipped": zero}
        expected |= {"clipped": zero} if joint == "grpo" else {}
    assert done.logs.keys() == expected.keys()
    near(done.logs, expected, rtol=1e-5, atol=1e-7)


# The cold start.

START = ColdStart(updates=6, ramp=4, adapter_scale=0.8, alpha=4.0, beta=1.5)


def cold(start: ColdStart = START, **options) -> World:
    """A cold world; its networks are no adapters, so scales are recorded instead of applied."""
    world = dmdr(**options)
    world.module.cold_start = start
    world.scales = []
    ask = world.roles.velocity

    def velocity(role, latents, *, adapter_scale=1.0, **more):
        world.scales.append((role, adapter_scale))
        return ask(role, latents, **more)

    world.roles.velocity = velocity
    return world


def test_real_estimator_leans_toward_the_fake_score_and_falls_as_a_cosine():
    world = cold()
    found = []
    for _ in range(6):
        world.scales.clear()
        world.update()
        found.append([scale for role, scale in world.scales if role == "fake_score" and scale != 1.0])
        assert bool(world.questions("teacher")) == (len(found) > 4)
    expected = [0.8 * (1 + math.cos(math.pi * update / 4)) / 2 for update in range(4)]
    assert [scales[0] for scales in found[:4]] == pytest.approx(expected)
    assert [len(scales) for scales in found] == [1, 1, 1, 1, 0, 0]


def test_real_estimator_is_guided_and_gives_the_direction():
    world = cold()
    _, steps = world.update()
    real, fake = world.questions("fake_score", inside="generator")
    assert (real.guidance_scale, fake.guidance_scale) == (2.5, 1.0)
    assert torch.equal(real.x, fake.x)
    state, x = sample(world)
    real_x0 = world.x0("fake_score", real.x, real.sigma, real.c, 2.5)
    fake_x0 = world.x0("fake_score", fake.x, fake.sigma, fake.c)
    n = (x - real_x0).abs().mean((1, 2, 3), keepdim=True)
    near(steps[0].gradient, world.pull_back("generator", state.sigma, state.c, (fake_x0 - real_x0) / n / x.numel()))


def test_adapter_scale_zero_leaves_the_teacher():
    world = cold(ColdStart(adapter_scale=0.0))
    world.update()
    assert len(world.questions("teacher")) == 1


def test_reward_joins_after_the_cold_start():
    world = cold()
    judged = []
    for _ in range(8):
        world.module.judge.reward.asked.clear()
        done, _ = world.update()
        judged.append(bool(world.module.judge.reward.asked))
        assert ("reward_sample" in done.logs) == judged[-1]
    assert judged == [False] * 6 + [True] * 2


def test_prompts_are_checked_before_the_cold_start():
    world = cold()
    world.module.judge.reward.check = lambda prompts: pytest.fail("checked")
    with pytest.raises(pytest.fail.Exception, match="checked"):
        world.update()


@pytest.mark.parametrize("update", [0, 2, 4])
def test_renoise_levels_of_both_scores_start_high(update):
    matching = Matching(renoise_distribution=Uniform(0.0, 1.0), fake_score_renoise_distribution=Uniform(0.0, 0.5))
    world = cold(ColdStart(ramp=4, adapter_scale=0.0), matching=matching, prompts=5, each=60)
    world.module.updates = update
    world.update()
    left = (1 + math.cos(math.pi * update / 4)) / 2
    mean = (1 + 3 * left) / (2 + 3.5 * left)  # of Beta(1 + 3 left, 1 + 0.5 left)
    (matched,) = world.questions("teacher")
    learned = world.questions("fake_score", learning=True)
    assert float(matched.sigma.mean()) == pytest.approx(mean, abs=0.04)
    assert float(torch.cat([q.sigma for q in learned]).mean()) == pytest.approx(0.5 * mean, abs=0.02)


def test_renoise_levels_after_the_ramp_are_dmds():
    world, plain = cold(), dmdr(DMD)
    world.module.updates = plain.module.updates = 4
    world.update()
    plain.update()
    assert torch.equal(world.questions("teacher")[0].sigma, plain.questions("teacher")[0].sigma)


@pytest.mark.parametrize("base", [Uniform(0.02, 0.98), LogitNormal()])
def test_tilted_levels_are_the_bases_quantiles_at_beta_quantiles(base):
    u = torch.linspace(0.01, 0.99, 99)
    assert torch.equal(Tilted(base, 1.0, 1.0).quantile(u), base.quantile(u))
    # Beta(2, 1) has the distribution function x^2, Beta(1, 2) has 1 - (1 - x)^2.
    near(Tilted(base, 2.0, 1.0).quantile(u), base.quantile(u.sqrt()))
    near(Tilted(base, 1.0, 2.0).quantile(u), base.quantile(1 - (1 - u).sqrt()))


def test_scaled_adapter_is_between_the_teacher_and_the_fake_score(tiny_pipeline):
    """What the real estimator is on real adapters: the network with that part of the fake score's weights."""
    torch.set_default_dtype(torch.float32)
    start = ColdStart(ramp=2, adapter_scale=0.5)
    module = tiny.module(tiny_pipeline, DMDR, reward=tiny.Brightness(), lora=LoRA(2, 4), cold_start=start)
    module.configure_model()
    with torch.no_grad():
        for name, parameter in module.roles.named_parameters():
            if ".lora_B.fake_score." in name:
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(1))
    latents = NoisyLatents(x, torch.tensor([0.4, 0.9]), module.embeddings(["a red circle", "a blue square"]))
    draw = RenoiseDraw(latents.sigma[:, None], x[:, None])
    found = []
    for module.updates in (0, 1, 2):
        found.append(module._ask_teacher(x, latents, draw))
    fake = [p for name, p in module.roles.named_parameters() if ".lora_B.fake_score." in name]
    expected = []
    for factor in (0.5, 0.5):  # of the weights themselves: a half, then a quarter
        with torch.no_grad():
            for parameter in fake:
                parameter.mul_(factor)
        expected.append(module.roles.x0("fake_score", latents, guidance_scale=3.0))
    expected.append(module.roles.x0("teacher", latents, guidance_scale=3.0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


# Settings.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward_weight": -1.0}, r"DMDR\.reward_weight: it is -1\.0"),
        ({"reward_weight": math.nan}, r"DMDR\.reward_weight: it is nan"),
        ({"joint": "grpo", "margin": 1.0}, r"model\.margin: set, but joint is 'grpo'"),
        ({"grpo": GRPO(clip=1e-3)}, r"model\.grpo: set, but joint is 'refl'"),
        ({"nft": NFT(beta=0.1)}, r"model\.nft: set, but joint is 'refl'"),
        ({"sample_advantages": SampleAdvantages("group")}, r"model\.sample_advantages: set, but joint is 'refl'"),
        ({"joint": "nft", "grpo": GRPO(clip=1e-3)}, r"model\.grpo: set, but joint is 'nft'"),
        ({"joint": "grpo", "grpo": GRPO(train_steps=4)}, r"model\.grpo\.train_steps: it is 4"),
        ({"joint": "grpo", "steps": 1}, r"model\.steps: it is 1"),
        ({"joint": "nft", "nft": NFT(train_steps=5)}, r"model\.nft\.train_steps: it is 5"),
        ({"cold_start": ColdStart()}, r"model\.cold_start\.adapter_scale: full copies are trained"),
        (
            {"cold_start": ColdStart(), "lora": LoRA(), "matching": Matching(guidance_levels="above")},
            r"model\.matching\.guidance_levels: it is 'above', but DynaDG",
        ),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        dmdr(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"updates": -1}, "updates: it is -1"),
        ({"ramp": 0}, "ramp: it is 0"),
        ({"adapter_scale": -0.1}, r"adapter_scale: it is -0\.1"),
        ({"alpha": 0.0}, r"alpha: it is 0\.0"),
        ({"beta": math.nan}, "beta: it is nan"),
    ],
)
def test_impossible_cold_starts_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ColdStart(**options)


def test_cold_start_without_an_adapter_scale_takes_full_copies_and_all_guidance_levels():
    world = dmdr(cold_start=ColdStart(adapter_scale=0.0), matching=Matching(guidance_levels="above"))
    assert world.module.lora is None


def test_refl_refuses_a_reward_without_gradient():
    reward = Liking()
    reward.differentiable = False
    with pytest.raises(UserError, match=r"model\.reward: 'liking' is not differentiable"):
        dmdr(reward=reward)
    assert dmdr(reward=reward, joint="grpo").module.joint == "grpo"


@pytest.mark.parametrize(("joint", "weight", "expected"), [("refl", 1, False), ("grpo", 1, True), ("nft", 0, False)])
def test_groups_are_needed_where_samples_are_compared(joint, weight, expected):
    assert dmdr(joint=joint, reward_weight=weight).module.needs_groups == expected


def test_sampler_of_generation_may_be_deterministic_with_grpo():
    assert dmdr(joint="grpo", sampler=ODE()).update()[0].logs["reward_sample"].isfinite()


def test_plan_follows_an_update_with_the_reward(tiny_pipeline):
    torch.set_default_dtype(torch.float32)
    options = {"reward": tiny.Brightness(), "lora": LoRA(2, 4), "cold_start": START}
    assert "decoding" in plan(tiny.module(tiny_pipeline, DMDR, **options), 4).phases
