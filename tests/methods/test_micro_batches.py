"""An update in micro-batches is the update of the whole batch."""

import pytest
import torch
from world import Liking, World

from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.grpo_terms import GRPO
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.nft_terms import NFT
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.methods.settings import Matching


def gdmd(policy: Policy, **options):
    # Rounded rewards are the same numbers whatever the last bit of a target.
    return GDMD, {"reward": Liking(digits=2), "policy": policy, "targets": TargetGroup(3), **options}


CASES = {
    "dmd": (DMD, {}),
    "dmd-fresh": (DMD, {"matching": Matching(fake_score_samples="fresh")}),
    "gdmd-weighted": gdmd(Policy(form="weighted")),
    "gdmd-snapshots": gdmd(Policy(form="weighted"), targets=TargetGroup(3, "both")),
    "gdmd-samples": gdmd(Policy(form="weighted"), advantages=TargetAdvantages("sample")),
    **{
        f"gdmd-{at}-{normalize}": gdmd(Policy(at=at, normalize=normalize, beta=0.6))
        for at in ("state", "target")
        for normalize in ("distillation", "error")
    },
    "refl": (ReFL, {"reward": Liking(), "margin": 1.0}),
    "flow-grpo": (FlowGRPO, {"reward": Liking(digits=2), "steps": 3, "grpo": GRPO(train_steps=1)}),
    "nft": (DiffusionNFT, {"reward": Liking(digits=2), "steps": 3, "nft": NFT(train_steps=1)}),
    "dmdr-refl": (DMDR, {"reward": Liking()}),
    "dmdr-grpo": (DMDR, {"reward": Liking(digits=2), "joint": "grpo", "grpo": GRPO(train_steps=1)}),
    "dmdr-nft": (DMDR, {"reward": Liking(digits=2), "joint": "nft", "nft": NFT(train_steps=1)}),
}
# A reward is float32, so ReFL's gradient is too.
EXACT = {name: 1e-6 if name.endswith("refl") else 1e-12 for name in CASES}


def both(name: str, rate: float = 0.0):
    method, options = CASES[name]
    found = []
    for size in (None, 4):  # 10 samples in groups of 2: the last micro-batch is smaller
        world = World(method, prompts=5, micro_batch_size=size, **options)
        found.append((world, *world.update(rate)))
    return found


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_batch(name, float64):
    (_, _, whole), (_, _, parts) = both(name)
    assert [step.role for step in whole] == [step.role for step in parts]
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one.gradient, other.gradient, rtol=EXACT[name], atol=EXACT[name])


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_whole_batch_in_float32(name):
    (_, _, whole), (_, _, parts) = both(name)
    for one, other in zip(whole, parts, strict=True):
        scale = max(float(value.abs().max()) for value in one.gradient.values())
        torch.testing.assert_close(one.gradient, other.gradient, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", CASES)
def test_logs_are_those_of_the_whole_batch(name, float64):
    (_, whole, _), (_, parts, _) = both(name)
    assert whole.logs.keys() == parts.logs.keys()
    torch.testing.assert_close(whole.logs, parts.logs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_gradient_passes_hold_no_more_than_a_micro_batch(name, float64):
    _, (world, _, _) = both(name)
    size = 4 * (3 if name.startswith("gdmd-target") else 1)
    assert max(len(q.x) for q in world.asked if q.gradient) <= size
    terms = 2 if name in ("dmdr-grpo", "dmdr-nft") else 1  # of the generator's step, each in three micro-batches
    counts = [len(step.losses) for step in both(name)[1][2]]
    assert counts[0] == 3 * terms
    assert set(counts[1:]) <= {3}


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("gdmd")])
def test_groups_are_judged_whole(name, float64):
    (_, whole, _), (_, parts, _) = both(name)
    torch.testing.assert_close(whole.record.advantages, parts.record.advantages, rtol=1e-6, atol=1e-7)
    assert parts.record.rewards.shape == (10, 3)


def test_forwards_without_gradient_are_split_too(float64):
    sizes = []
    world = World(DMD, prompts=5, micro_batch_size=4)
    predict = world.module.family.predict_velocity

    def counted(network, x, *rest):
        sizes.append(len(x))
        return predict(network, x, *rest)

    world.module.family.predict_velocity = counted
    world.update()
    assert max(sizes) <= 4


def test_rewards_are_scored_in_micro_batches(float64):
    world = World(GDMD, reward=Liking(), targets=TargetGroup(3), prompts=5, micro_batch_size=4)
    world.update()
    assert {len(images) for images, _ in world.module.judge.reward.asked} == {4, 2}
