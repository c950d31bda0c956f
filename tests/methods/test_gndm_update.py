"""One update of GNDM and GNDMR in the world that is known in closed form."""

import pytest
import tiny
import torch
from world import GaussianFamily, Liking, World, liking, near, noise_in

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gndm import GNDM, GNDMR, CombinedAdvantages
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.methods.settings import Matching

pytestmark = pytest.mark.usefixtures("float64")


def gndm(**options) -> World:
    return World(GNDM, **{"matching": Matching(guidance_scale=2.5), "each": 3, **options})


def gndmr(**options) -> World:
    options = {"reward": Liking(), "matching": Matching(guidance_scale=2.5), "each": 3, **options}
    return World(GNDMR, **options)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def over_groups(values: torch.Tensor, world: World) -> torch.Tensor:
    """Means of each prompt's rows, by a loop."""
    groups = world.batch.groups
    return torch.stack([values[groups == group].mean() for group in groups])


class Matched:
    """An update's quantities in closed form, from what was asked."""

    def __init__(self, world: World) -> None:
        self.state = next(q for q in world.questions("generator", learning=True))
        self.x = world.x0("generator", self.state.x, self.state.sigma, self.state.c)
        (self.teacher,) = world.questions("teacher")
        x_t, t = self.teacher.x, self.teacher.sigma
        self.real = world.x0("teacher", x_t, t, world.c, world.module.matching.guidance_scale)
        self.fake = world.x0("fake_score", x_t, t, world.c)
        self.n = over_groups((self.x - self.real).abs().mean((1, 2, 3)), world)
        self.g = (self.fake - self.real) / column(self.n)


def test_generator_gradient_is_normalized_by_the_groups_mean():
    world = gndm()
    done, steps = world.update()
    m = Matched(world)
    near(steps[0].gradient, world.pull_back("generator", m.state.sigma, m.state.c, m.g / m.x.numel()))
    assert len(m.n.unique()) == 3
    near(done.logs["normalizer"], m.n.mean())


@pytest.mark.parametrize("method", ["gndm", "gndmr"])
def test_each_group_has_one_level_and_each_sample_its_own_noise(method):
    world = gndm(prompts=4) if method == "gndm" else gndmr(prompts=4)
    world.update()
    m = Matched(world)
    levels = m.teacher.sigma.view(4, 3)
    assert (levels == levels[:, :1]).all()
    assert len(levels[:, 0].unique()) == 4
    noise = noise_in(m.teacher, m.x)
    assert not torch.allclose(noise[0], noise[1])


def test_a_group_keeps_the_guidance_level_of_its_first_sample():
    world = gndm(matching=Matching(guidance_scale=2.5, guidance_levels="all"))
    world.update()
    levels = world.questions("teacher guidance")[0].sigma.view(3, 3)
    assert (levels == levels[:, :1]).all()
    assert len(levels[:, 0].unique()) == 3


def test_one_sample_per_prompt_is_dmd():
    found = [[step.gradient for step in World(method, each=1).update()[1]] for method in (DMD, GNDM)]
    near(*found, rtol=0, atol=0)


def test_without_policy_term_gndmr_is_gndm():
    found = [[step.gradient for step in world.update()[1]] for world in (gndm(), gndmr(lambda_policy=0.0))]
    near(*found, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "options"),
    [(gndm, {}), (gndmr, {}), (gndmr, {"policy": Policy(normalize="distillation")})],
    ids=["gndm", "gndmr", "gndmr-distillation"],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(method, options):
    near(*([step.gradient for step in method(micro_batch_size=size, **options).update()[1]] for size in (None, 2)))


def advantages(world: World, m: Matched) -> torch.Tensor:
    """``A_dm + weight A_reward`` by loops over groups."""
    settings = world.module.combination
    distance = lambda end: (m.x - end).square().mean((1, 2, 3))  # noqa: E731
    total = torch.zeros(len(m.x))
    rewards = liking(GaussianFamily().decode(m.x), world.batch.prompts)
    for weight, values in ((1.0, distance(m.fake) - distance(m.real)), (settings.weight, rewards)):
        centered = values - over_groups(values, world)
        if settings.spread == "batch":
            centered = centered / centered.square().mean().sqrt()
        elif settings.spread == "group":
            # At pure noise all samples of a prompt are alike, which is no preference.
            centered = torch.nan_to_num(centered / over_groups(centered.square(), world).sqrt(), nan=0.0)
        total += weight * centered
    return total


@pytest.mark.parametrize("normalize", ["distillation", "error"])
@pytest.mark.parametrize(
    "settings",
    [CombinedAdvantages(), CombinedAdvantages(0.4, "none", 1.0), CombinedAdvantages(2.0, "group", 0.7)],
    ids=["batch", "none", "group"],
)
def test_gndmr_gradient_is_the_closed_form(settings, normalize):
    policy = Policy(normalize=normalize, beta=0.7)
    world = gndmr(combination=settings, policy=policy, lambda_policy=0.3)
    _, steps = world.update()
    m = Matched(world)
    clip = settings.clip
    o = column(0.5 + advantages(world, m).clamp(-clip, clip) / (2 * clip))
    (asked,) = world.questions("old")
    now, old = (world.x0(role, asked.x, asked.sigma, asked.c) for role in ("generator", "old"))
    plus, minus = old + 0.7 * (now - old), old - 0.7 * (now - old)
    n_plus = n_minus = column(m.n)
    if normalize == "error":
        n_plus, n_minus = ((part - m.x).abs().mean((1, 2, 3), keepdim=True) for part in (plus, minus))
    d_now = 2 * (o * (plus - m.x) / n_plus - (1 - o) * (minus - m.x) / n_minus) / m.x.numel()
    own = world.pull_back("generator", m.state.sigma, m.state.c, m.g / m.x.numel())
    term = world.pull_back("generator", asked.sigma, asked.c, d_now)
    near(steps[0].gradient, {name: own[name] + 0.3 * term[name] for name in own}, rtol=1e-4, atol=1e-7)


def test_policies_are_asked_at_samples_renoised_to_their_states_level():
    world = gndmr(prompts=5, each=20)
    world.update()
    m = Matched(world)
    (old,) = world.questions("old")
    near(old.sigma, m.state.sigma)
    assert torch.equal(old.c, world.c)
    noise = noise_in(old, m.x)
    assert abs(float(noise.std()) - 1) < 0.05
    assert not torch.allclose(noise, noise_in(m.teacher, m.x))


def test_reward_scores_decoded_samples_under_their_prompts():
    world = gndmr()
    done, _ = world.update()
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(Matched(world).x))
    assert prompts == world.batch.prompts
    near(done.logs["reward_sample"], liking(images, prompts).mean(), rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lambda_policy": -1.0}, r"GNDMR\.lambda_policy: it is -1\.0"),
        ({"policy": Policy(form="weighted")}, r"model\.policy: form is 'weighted' and at 'target'"),
        ({"policy": Policy(at="state")}, r"model\.policy: form is 'full' and at 'state'"),
    ],
)
def test_gndmr_refuses_what_has_no_meaning(settings, said):
    with pytest.raises(UserError, match=said):
        gndmr(**settings)


@pytest.mark.parametrize("wrong", [{"weight": -0.1}, {"clip": 0.0}])
def test_combined_advantages_refuse_numbers_out_of_range(wrong):
    with pytest.raises(UserError, match=r"CombinedAdvantages\.(weight|clip): it is"):
        CombinedAdvantages(**wrong)


def test_one_sample_per_prompt_is_refused_before_anything_is_loaded(tiny_pipeline):
    module = tiny.module(tiny_pipeline, GNDM)
    with pytest.raises(UserError, match=r"data\.group_size: it is 1, but GNDM compares the samples of a prompt"):
        tiny.train(module, 1, data={"group_size": 1})
    assert not hasattr(module, "roles")
