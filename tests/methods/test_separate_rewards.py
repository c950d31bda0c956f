"""GDMD with several rewards, each normalized on its own before they are summed."""

import pytest
import torch
from world import GaussianFamily, Liking, World, liking, near

from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.rewards.combine import CombinedReward

pytestmark = pytest.mark.usefixtures("float64")
SIZE, WEIGHTS = 3, (1.0, 2.0)


class Redness(Liking):
    """The first color alone, on a far larger scale."""

    def score(self, images, prompts):
        return 1000 * images[:, 0].mean((1, 2))


def judged(reward=None, **options):
    reward = reward or CombinedReward([Liking(), Redness()], list(WEIGHTS))
    advantages = TargetAdvantages(**{"rewards": "separately", "clip": 100.0, **options})
    matching = Matching(guidance_scale=2.0)
    world = World(GDMD, reward=reward, targets=TargetGroup(SIZE), advantages=advantages, matching=matching)
    return world, world.update()[0].record


def scores(world, record) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of targets ``[B, M]`` and samples ``[B]``, by each reward."""
    decode, prompts = GaussianFamily().decode, world.batch.prompts
    many = [prompt for prompt in prompts for _ in range(SIZE)]
    y, x = decode(record.targets.flatten(0, 1)), decode(record.x)
    return [
        (liking(y, many).view(-1, SIZE), liking(x, prompts)),
        (1000 * y[:, 0].mean((1, 2)).view(-1, SIZE), 1000 * x[:, 0].mean((1, 2))),
    ]


def expected(world, record, compare, spread, center) -> torch.Tensor:
    total = torch.zeros(len(record.x), SIZE)
    groups = range(len(record.x)) if compare == "state" else world.batch.groups.unique().tolist()
    member = torch.arange(len(record.x)) if compare == "state" else world.batch.groups
    for weight, (rewards, own) in zip(WEIGHTS, scores(world, record), strict=True):
        a = rewards - own[:, None] if compare == "sample" else rewards.clone()
        if center:
            a = a - a.mean(0)
        if compare == "sample":
            a = a / a.square().mean().sqrt()
        else:
            for group in groups:
                mine = member == group
                a[mine] = a[mine] - a[mine].mean()
                if spread == "group":
                    a[mine] = a[mine] / a[mine].square().mean().sqrt()
            if spread == "batch":
                a = a / a.square().mean().sqrt()
        total += weight * a
    return total / total.square().mean().sqrt()


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize(
    ("compare", "spread"),
    [("state", "group"), ("state", "batch"), ("prompt", "group"), ("prompt", "batch"), ("sample", "batch")],
)
def test_gdmd_normalizes_each_reward_on_its_own(compare, spread, center):
    options = {"compare": compare, "spread": spread, "center_strata": center, "score_samples": True}
    world, record = judged(**options)
    near(record.advantages, expected(world, record, compare, spread, center), rtol=1e-4, atol=1e-6)
    (likes, own_likes), (reds, own_reds) = scores(world, record)
    near(record.rewards, likes + 2 * reds, rtol=1e-4)
    near(record.sample_reward, own_likes + 2 * own_reds, rtol=1e-4)


def test_a_rewards_scale_does_not_matter_when_rewards_are_normalized_separately():
    class Tiny(Redness):
        def score(self, images, prompts):
            return super().score(images, prompts) / 100

    parts = ([Liking(), Redness()], [Liking(), Tiny()])
    one, other = (judged(CombinedReward(part, [1.0, 1.0]))[1].advantages for part in parts)
    near(one, other, rtol=1e-4, atol=1e-6)
    jointly, differs = (judged(CombinedReward(part, [1.0, 1.0]), rewards="jointly")[1].advantages for part in parts)
    assert (jointly - differs).abs().max() > 0.1


def test_one_reward_normalized_separately_is_normalized_jointly_by_the_batch():
    near(*(judged(Liking(), rewards=how)[1].advantages for how in ("separately", "jointly")), rtol=1e-5, atol=1e-7)


def test_samples_are_not_judged_unless_asked():
    assert judged()[1].sample_reward is None
