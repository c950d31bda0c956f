"""One update of GDMD in the world that is known in closed form: targets, judgments, weights, policies, snapshots."""

import itertools

import pytest
import torch
from world import SHAPE, GaussianFamily, Liking, World, liking, near, noise_in

from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.schedules import Uniform

pytestmark = pytest.mark.usefixtures("float64")

WEIGHTED = Policy(form="weighted")
POLICIES = [
    WEIGHTED,
    *(
        Policy(at=at, normalize=normalize, beta=0.7)
        for at in ("state", "target")
        for normalize in ("distillation", "error")
    ),
]
IDS = [f"{p.form}-{p.at}-{p.normalize}" for p in POLICIES]


def gdmd(reward=None, **options) -> World:
    options = {"targets": TargetGroup(3), "matching": Matching(guidance_scale=2.0), **options}
    return World(GDMD, reward=reward or Liking(), **options)


class Judged:
    """All of an update's quantities in closed form, from the states and the renoised samples alone; ``M`` targets."""

    def __init__(self, world: World) -> None:
        self.world, module = world, world.module
        self.state = next(q for q in world.questions("generator", learning=True))
        self.x = world.x0("generator", self.state.x, self.state.sigma, self.state.c)
        self.size = module.targets.size
        (self.teacher,) = world.questions("teacher")
        self.each = torch.stack([x for x in self.x for _ in range(self.size)])
        self.c = torch.stack([c for c in world.c for _ in range(self.size)])
        self.turn = [j % (1 + len(module.snapshots)) for _ in world.batch.prompts for j in range(self.size)]
        x_t, t = self.teacher.x, self.teacher.sigma
        self.real = world.x0("teacher", x_t, t, self.c, module.matching.guidance_scale)
        names = ("fake_score", *module.snapshots)
        answers = [world.x0(name, x_t, t, self.c) for name in names]
        self.fake = torch.stack([answers[turn][row] for row, turn in enumerate(self.turn)])
        self.y = self.each - (self.fake - self.real)
        self.n = (self.each - self.real).abs().mean((1, 2, 3)).clamp(min=module.matching.floor)
        self.prompts = [prompt for prompt in world.batch.prompts for _ in range(self.size)]
        decode = GaussianFamily().decode
        self.rewards = liking(decode(self.y), self.prompts)
        self.sample_reward = liking(decode(self.x), world.batch.prompts)

    def advantages(self) -> torch.Tensor:
        """By loops over groups."""
        module, world = self.world.module, self.world
        settings, r = module.advantages, self.rewards.clone()
        batch = len(self.x)
        if settings.compare == "sample":
            r = r - torch.stack([s for s in self.sample_reward for _ in range(self.size)])
        if settings.center_strata:
            for j in range(self.size):
                r[j :: self.size] -= r[j :: self.size].mean()
        if settings.compare == "sample":
            return r / r.square().mean().sqrt()
        rows = torch.arange(batch * self.size) // self.size
        members = rows if settings.compare == "state" else world.batch.groups[rows]
        a = torch.zeros_like(r)
        for group in members.unique():
            mine = members == group
            a[mine] = r[mine] - r[mine].mean()
            if settings.spread == "group":
                a[mine] /= a[mine].square().mean().sqrt()
        return a / a.square().mean().sqrt() if settings.spread == "batch" else a

    def o(self) -> torch.Tensor:
        clip = self.world.module.advantages.clip
        return 0.5 + self.advantages().clamp(-clip, clip) / (2 * clip)


def column(values: torch.Tensor) -> torch.Tensor:
    return values.view(-1, 1, 1, 1)


def distillation_gradient(j: Judged) -> torch.Tensor:
    """Of the mean distillation loss in each target's copy of the sample."""
    return (j.fake - j.real) / column(j.n) / j.each.numel()


def expected_gradient(world: World) -> dict[str, torch.Tensor]:
    """Of the generator's weights, by the formulas of the method, branch by branch."""
    j, policy, weight = Judged(world), world.module.policy, world.module.lambda_policy
    sigma = torch.stack([s for s in j.state.sigma for _ in range(j.size)])
    o, g = column(j.o()), distillation_gradient(j)
    if policy.form == "weighted":
        return world.pull_back("generator", sigma, j.c, (1 + 2 * weight * (2 * o - 1)) * g)
    if policy.at == "state":
        at_x, at_c = torch.stack([x for x in j.state.x for _ in range(j.size)]), j.c
    else:
        (asked,) = world.questions("old")
        at_x, at_c = asked.x, asked.c
    now, old = (world.x0(role, at_x, sigma, at_c) for role in ("generator", "old"))
    plus, minus = old + policy.beta * (now - old), old - policy.beta * (now - old)
    n_plus = n_minus = column(j.n)
    if policy.normalize == "error":
        n_plus, n_minus = ((part - j.y).abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-3) for part in (plus, minus))
    # d plus / d now = beta and d minus / d now = -beta cancel the division by beta.
    d_now = 2 * (o * (plus - j.y) / n_plus - (1 - o) * (minus - j.y) / n_minus) / j.each.numel()
    own = world.pull_back("generator", sigma, j.c, g)
    term = world.pull_back("generator", sigma, at_c, d_now)
    return {name: own[name] + weight * term[name] for name in own}


# The generator's step.


@pytest.mark.parametrize("policy", POLICIES, ids=IDS)
@pytest.mark.parametrize("lambda_policy", [1.0, 0.3])
def test_generator_gradient_is_the_closed_form(policy, lambda_policy):
    world = gdmd(policy=policy, lambda_policy=lambda_policy)
    _, steps = world.update()
    near(steps[0].gradient, expected_gradient(world), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("over", ["renoise", "snapshot", "both"])
@pytest.mark.parametrize("compare", ["state", "prompt", "sample"])
def test_generator_gradient_is_the_closed_form_for_every_group(over, compare):
    world = gdmd(
        policy=WEIGHTED,
        targets=TargetGroup(4, over, **({} if over == "renoise" else {"snapshot_every": 100})),
        advantages=TargetAdvantages(compare=compare),
    )
    world.module.updates = 1
    _, steps = world.update()
    near(steps[0].gradient, expected_gradient(world), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("spread", ["group", "batch", "none"])
@pytest.mark.parametrize("clip", [0.4, 5.0])
@pytest.mark.parametrize("center_strata", [False, True])
def test_generator_gradient_is_the_closed_form_for_every_advantage(spread, clip, center_strata):
    settings = TargetAdvantages(spread=spread, clip=clip, center_strata=center_strata)
    world = gdmd(policy=WEIGHTED, advantages=settings)
    _, steps = world.update()
    near(steps[0].gradient, expected_gradient(world), rtol=1e-4, atol=1e-7)


def test_center_strata_applies_to_comparison_with_the_sample():
    world = gdmd(policy=WEIGHTED, advantages=TargetAdvantages(compare="sample", center_strata=True))
    done, _ = world.update()
    near(done.record.advantages.flatten(), Judged(world).advantages(), rtol=1e-4)


def test_a_flat_reward_gives_the_gradient_of_dmd():
    world = gdmd(Liking(strength=0.0), policy=WEIGHTED)
    _, steps = world.update()
    j = Judged(world)
    sigma = j.state.sigma.repeat_interleave(j.size)
    near(steps[0].gradient, world.pull_back("generator", sigma, j.c, distillation_gradient(j)))


def test_teacher_is_a_fixed_point_under_a_flat_reward():
    world = gdmd(Liking(strength=0.0), policy=WEIGHTED, matching=Matching(guidance_scale=1.0))
    world.make_equal("teacher", "generator", "fake_score")
    _, steps = world.update()
    near(steps[0].gradient, {"gain": torch.tensor(0.0), "shift": torch.zeros(SHAPE)})


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_reward_moves_samples_along_its_covariance_with_the_targets(sign):
    """What the reward adds to the movement of each target's sample is ``2 lambda A / A_max`` times its own step."""
    clip = 100.0
    advantages = TargetAdvantages("state", "none", clip=clip)
    world = gdmd(Liking(strength=sign), policy=WEIGHTED, advantages=advantages, prompts=1, each=6)
    _, steps = world.update()
    j = Judged(world)
    reward = sign * liking(GaussianFamily().decode(j.y), j.prompts, 1.0)
    centered_r = (reward.view(6, 3) - reward.view(6, 3).mean(1, keepdim=True)).flatten()
    step = (j.y - j.each) / column(j.n)
    sigma = j.state.sigma.repeat_interleave(3)
    covariance = world.pull_back("generator", sigma, j.c, -2 / clip * column(centered_r) * step / step.numel())
    own = world.pull_back("generator", sigma, j.c, distillation_gradient(j))
    near({k: steps[0].gradient[k] - own[k] for k in own}, covariance, rtol=1e-5)


@pytest.mark.parametrize(
    "policy", [p for p in POLICIES if p.normalize == "distillation"], ids=lambda p: f"{p.form}-{p.at}"
)
def test_generator_moves_up_a_reward_that_only_targets_can_show(policy):
    """One step changes the reward of the samples more than a step of the opposite reward does."""
    gained = []
    for strength in (10.0, -10.0):
        world = gdmd(Liking(strength=strength), policy=policy, lambda_policy=3.0, prompts=1, each=16, steps=1)
        if policy.form == "full":
            world.make_equal("generator", "old")
        world.update(rate=0.02)
        q = world.questions("generator", learning=True)[0]
        x = world.x0("generator", q.x, q.sigma, q.c, now=True)
        gained.append(float(liking(GaussianFamily().decode(x), world.batch.prompts).mean()))
    assert gained[0] > gained[1]


def test_full_form_at_the_old_policy_is_the_weighted_form():
    found = []
    for policy in (WEIGHTED, Policy(at="state", normalize="distillation", beta=0.4)):
        world = gdmd(policy=policy, lambda_policy=0.6)
        if policy.form == "full":
            world.make_equal("generator", "old")
        found.append(world.update()[1][0].gradient)
    near(*found)


def test_one_target_without_policy_is_dmd():
    found = []
    for method, options in ((DMD, {}), (GDMD, {"reward": Liking(), "targets": TargetGroup(1), "lambda_policy": 0.0})):
        world = World(method, **options)
        found.append([step.gradient for step in world.update()[1]])
    near(*found, rtol=1e-12)


# Who was asked what.


def test_every_target_is_asked_with_its_own_samples_prompt():
    world = gdmd(policy=Policy(at="target"))
    world.update()
    each = world.c.repeat_interleave(3, dim=0)
    (policy,) = [q for q in world.questions("generator", learning=True) if len(q.x) == len(each)]
    asked = [*world.questions("teacher"), *world.questions("fake_score", inside="generator")]
    for q in [*asked, *world.questions("old"), policy]:
        assert torch.equal(q.c, each)


def test_teacher_alone_is_guided():
    world = gdmd(targets=TargetGroup(4, "both"))
    world.update()
    assert {q.role for q in world.asked if q.guidance_scale != 1.0} == {"teacher"}
    assert {q.guidance_scale for q in world.questions("teacher")} == {2.0}


def test_policies_are_asked_at_targets_renoised_to_the_states_level():
    world = gdmd(policy=Policy(at="target"), prompts=5, each=8)
    world.update()
    j = Judged(world)
    (old,) = world.questions("old")
    near(old.sigma, torch.stack([s for s in j.state.sigma for _ in range(3)]))
    eps = noise_in(old, j.y)
    assert abs(float(eps.std()) - 1) < 0.05
    assert abs(float(torch.corrcoef(torch.stack([eps.flatten(), noise_in(j.teacher, j.each).flatten()]))[0, 1])) < 0.1


def test_old_and_new_policy_are_asked_at_the_same_input():
    world = gdmd(policy=Policy(at="target"))
    world.update()
    (old,) = world.questions("old")
    assert any(q.x.shape == old.x.shape and torch.equal(q.x, old.x) for q in world.questions("generator", True))


def test_policy_noise_differs_between_updates():
    world = gdmd(policy=Policy(at="target"), steps=1)
    found = []
    for _ in range(2):
        world.update()
        found.append(noise_in(world.questions("old")[0], Judged(world).y))
    assert not torch.allclose(*found)


def test_policies_at_the_state_are_asked_at_the_state():
    world = gdmd(policy=Policy(at="state"))
    world.update()
    (old,) = world.questions("old")
    assert torch.equal(old.x, world.questions("generator", learning=True)[0].x)


def test_every_target_of_a_group_has_its_own_noise():
    world = gdmd()
    world.update()
    j = Judged(world)
    noise = noise_in(j.teacher, j.each).flatten(1)
    assert len({tuple(row.tolist()) for row in noise.mul(1e6).round()}) == len(noise)


def test_levels_of_a_group_are_stratified():
    world = gdmd(targets=TargetGroup(5), matching=Matching(renoise_distribution=Uniform(0.0, 1.0)))
    world.update()
    (teacher,) = world.questions("teacher")
    assert (torch.arange(5) == (teacher.sigma.view(-1, 5) * 5).long()).all()


def test_targets_of_snapshots_share_one_level_and_have_their_own_noise():
    world = gdmd(targets=TargetGroup(4, "snapshot"), prompts=4)
    world.update()
    j = Judged(world)
    levels = j.teacher.sigma.view(-1, 4)
    assert (levels == levels[:, :1]).all()
    assert len(levels[:, 0].unique()) == len(levels)
    noise = noise_in(j.teacher, j.each)
    assert not torch.allclose(noise[0], noise[1])


# Rewards and advantages.


def test_reward_scores_decoded_targets_under_their_own_prompts():
    world = gdmd()
    world.update()
    j = Judged(world)
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(j.y))
    assert prompts == tuple(j.prompts)


def test_reward_scores_samples_after_targets_when_asked():
    world = gdmd(advantages=TargetAdvantages(score_samples=True))
    done, _ = world.update()
    j = Judged(world)
    ((images, prompts),) = world.module.judge.reward.asked
    near(images, GaussianFamily().decode(torch.cat([j.y, j.x])))
    assert prompts == (*j.prompts, *world.batch.prompts)
    near(done.record.sample_reward, j.sample_reward)


def test_scoring_samples_does_not_change_the_gradient():
    one, other = (gdmd(advantages=TargetAdvantages(score_samples=score)).update()[1] for score in (False, True))
    near(one[0].gradient, other[0].gradient, rtol=1e-12)


@pytest.mark.parametrize(
    ("compare", "spread"),
    [("sample", "batch"), *itertools.product(["state", "prompt"], ["group", "batch", "none"])],
)
def test_record_holds_each_targets_own_advantage(compare, spread):
    world = gdmd(advantages=TargetAdvantages(compare, spread))
    done, _ = world.update()
    j = Judged(world)
    near(done.record.advantages.flatten(), j.advantages(), rtol=1e-5)
    near(done.record.optimality.flatten(), j.o(), rtol=1e-5)


def test_groups_of_different_prompts_do_not_compare():
    """Raising the reward of one prompt's targets changes nobody's advantage."""

    class Biased(Liking):
        def score(self, images, prompts):
            first = torch.tensor([prompt.text.startswith("0.5") for prompt in prompts])
            return super().score(images, prompts) + 7.0 * first

    one, other = (gdmd(reward).update()[0].record.advantages for reward in (Liking(), Biased()))
    near(one, other, rtol=1e-4)


def test_record_holds_the_closed_form_targets():
    world = gdmd(targets=TargetGroup(4, "both", snapshots=2, snapshot_every=100))
    world.module.updates = 1
    done, _ = world.update()
    j, record = Judged(world), done.record
    near(record.targets.flatten(0, 1), j.y)
    near(record.x, j.x)
    near(record.sigma, j.state.sigma)
    near(record.renoise_sigma.flatten(), j.teacher.sigma)
    near(record.rewards.flatten(), j.rewards, rtol=1e-5)
    near(record.gradient.flatten(), (j.fake - j.real).abs().mean((1, 2, 3)) / j.n)
    assert record.snapshot.tolist() == [0, 1, 2, 0]
    assert record.prompts == world.batch.prompts


@pytest.mark.parametrize("score_samples", [False, True])
def test_logs_are_the_closed_form_figures(score_samples):
    world = gdmd(
        policy=WEIGHTED,
        lambda_policy=0.8,
        advantages=TargetAdvantages(score_samples=score_samples, clip=1.0),
        matching=Matching(guidance_scale=2.0, fake_score_updates=2),
    )
    done, steps = world.update()
    j = Judged(world)
    weight = 1 + 1.6 * (2 * j.o() - 1)
    rewards = j.rewards.view(-1, 3)
    distance = (j.fake - j.real).square().mean((1, 2, 3))
    expected = {
        "loss": (weight * 0.5 * distance / j.n).mean(),
        "reward_target": rewards.mean(),
        "reward_spread": rewards.std(1).mean(),
        "gradient": ((j.fake - j.real).abs().mean((1, 2, 3)) / j.n).mean(),
        "weight_negative": (weight < 0).double().mean(),
        "advantage_clipped": (j.advantages().abs() >= 1).double().mean(),
        "advantage_level_correlation": torch.corrcoef(torch.stack([j.advantages(), j.teacher.sigma]))[0, 1],
        "sample_std": j.x.std(),
        "groups_without_spread": torch.tensor(0.0),
        "fake_score_loss": (steps[1].losses[0] + steps[2].losses[0]) / 2,
    }
    if score_samples:
        expected["reward_sample"] = j.sample_reward.mean()
        expected["targets_better"] = (rewards > j.sample_reward[:, None]).double().mean()
    assert done.logs.keys() == expected.keys()
    near(done.logs, expected, rtol=1e-5)


# The fake score, averages and snapshots.


def test_fake_score_learns_from_the_generators_samples():
    world = gdmd(prompts=5, each=20)
    world.update()
    x = Judged(world).x
    for q in world.questions("fake_score", learning=True):
        assert torch.equal(q.c, world.c)
        assert abs(float(noise_in(q, x).std()) - 1) < 0.05


def test_averages_follow_the_generator_with_their_own_decays():
    world = gdmd(policy=Policy(old_decay=0.5), ema_decay=0.9)
    before = {role: world.weights(role) for role in ("old", "ema")}
    world.update(rate=0.1)
    after = world.weights("generator")
    for role, decay in (("old", 0.5), ("ema", 0.9)):
        near(world.weights(role), {k: decay * before[role][k] + (1 - decay) * after[k] for k in after})


def test_weighted_form_has_no_old_policy():
    assert [spec.name for spec in gdmd(policy=WEIGHTED).roles.specs] == ["generator", "ema", "fake_score"]


def test_snapshots_are_kept_when_due_and_in_turn():
    world = gdmd(targets=TargetGroup(2, "snapshot", snapshots=2, snapshot_every=3))
    kept = []
    copy = world.roles.copy
    world.roles.copy = lambda *names: (kept.append((world.module.updates, *names)), copy(*names))
    for _ in range(10):
        world.update()
    assert kept == [
        (0, "fake_score", "fake_score@1"),
        (3, "fake_score", "fake_score@2"),
        (6, "fake_score", "fake_score@1"),
        (9, "fake_score", "fake_score@2"),
    ]


def test_a_snapshot_is_the_fake_score_before_its_updates_steps():
    world = gdmd(targets=TargetGroup(2, "snapshot", snapshots=1, snapshot_every=2))
    before = world.weights("fake_score")
    world.update(rate=0.1)
    near(world.weights("fake_score@1"), before, rtol=1e-12)
    world.update(rate=0.1)
    near(world.weights("fake_score@1"), before, rtol=1e-12)
    assert not torch.equal(world.weights("fake_score")["gain"], before["gain"])


def test_snapshots_are_asked_about_their_own_rows():
    world = gdmd(targets=TargetGroup(4, "both", snapshots=2, snapshot_every=100))
    world.module.updates = 1
    world.update()
    (teacher,) = world.questions("teacher")
    for turn, role in enumerate(("fake_score", "fake_score@1", "fake_score@2")):
        (asked,) = world.questions(role, inside="generator")
        rows = [row for row in range(len(teacher.x)) if row % 4 % 3 == turn]
        assert torch.equal(asked.x, teacher.x[rows])
        assert torch.equal(asked.c, teacher.c[rows])
        assert torch.equal(asked.sigma, teacher.sigma[rows])


def test_groups_over_renoise_keep_no_snapshot():
    assert gdmd(targets=TargetGroup(4, "renoise", snapshots=2)).module.snapshots == ()
