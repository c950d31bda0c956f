"""``model.speed.overlap_reward``: the fake score learns while a reward is asked, and the update stays what it is."""

import threading
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import tiny
from world import Liking, World, near

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.advantages import TargetAdvantages, TargetGroup
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.gndm import GNDMR
from gdmd_lightning.methods.reward_terms import Policy
from gdmd_lightning.methods.settings import Matching, Memory, Speed
from gdmd_lightning.planning.footprint import plan
from gdmd_lightning.rewards.clip import ContrastiveReward
from gdmd_lightning.rewards.combine import CombinedReward

OVERLAP = Speed(overlap_reward=True)
CASES = {
    "weighted": {"policy": Policy(form="weighted")},
    "state": {"policy": Policy(at="state", beta=0.6)},
    "target": {"policy": Policy(at="target", beta=0.6)},
    "snapshots": {"targets": TargetGroup(3, "both")},
    "samples": {"advantages": TargetAdvantages("sample")},
    "separate": {"advantages": TargetAdvantages(rewards="separately")},
}


def reward(name: str):
    if name != "separate":
        return Liking(digits=2)
    return CombinedReward([Liking(digits=2), Liking(3.0, digits=2)], [1.0, 2.0])


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("name", CASES)
def test_two_updates_are_those_without(name, size, float64):
    """With steps taken: the fake score that gives the targets is the one before its steps."""
    found = []
    for speed in (Speed(), OVERLAP):
        options = {"targets": TargetGroup(3), "micro_batch_size": size, "speed": speed, **CASES[name]}
        world = World(GDMD, prompts=5, reward=reward(name), **options)
        found.append((world, [world.update(rate=0.05) for _ in range(2)]))
    (plain, updates), (overlapped, others) = found
    for (done, steps), (other, other_steps) in zip(updates, others, strict=True):
        assert {step.role for step in steps} == {step.role for step in other_steps} == {"generator", "fake_score"}
        near(other.logs, done.logs)
        assert done.record.rewards.std() > 0
        ours, theirs = (asdict(each.record) for each in (done, other))
        for field in ours.keys() - {"prompts"}:
            near(theirs[field], ours[field])
    for role in ("generator", "fake_score", "ema"):
        near(overlapped.weights(role), plain.weights(role), rtol=1e-10)


def test_fake_score_learns_while_the_reward_is_asked():
    """The reward answers only after the fake score's last step."""
    learned = threading.Event()

    class Patient(Liking):
        def score(self, images, prompts):
            assert learned.wait(20)
            return super().score(images, prompts)

    world = World(GDMD, reward=Patient(), speed=OVERLAP, matching=Matching(fake_score_updates=2))
    train = world.module.train_fake_score

    def then_tell(*arguments):
        logs = train(*arguments)
        learned.set()
        return logs

    world.module.train_fake_score = then_tell
    _, steps = world.update()
    assert [step.role for step in steps] == ["fake_score", "fake_score", "generator"]


def test_error_of_the_reward_ends_the_update():
    class Broken(Liking):
        def score(self, images, prompts):
            raise RuntimeError("no answer")

    world = World(GDMD, reward=Broken(), speed=OVERLAP)
    with pytest.raises(UserError, match="reward 'liking': raised RuntimeError: no answer"):
        world.update()
    assert not any(thread.name.startswith("reward") for thread in threading.enumerate())


def test_samples_are_computed_twice(tiny_pipeline):
    found = {}
    for speed in (Speed(), OVERLAP):
        module = tiny.module(tiny_pipeline, GDMD, targets=TargetGroup(2), speed=speed)
        tiny.train(module, 1, data={"batch_size": 8, "group_size": 2})
        found[speed.overlap_reward] = dict(module.roles.evaluations)
    found[False]["generator"] += 8
    assert found[True] == found[False]


def test_pictures_that_wait_are_planned(tiny_pipeline):
    """They are in memory while the fake score learns."""
    peaks = []
    for speed in (Speed(), OVERLAP):
        module = tiny.module(tiny_pipeline, GDMD, targets=TargetGroup(4), policy=Policy(form="weighted"), speed=speed)
        peaks.append(plan(module, 8).phases["fake_score forward"])
    assert peaks[1] - peaks[0] == pytest.approx(8 * 4 * 3 * 32 * 32 * 4, rel=0.01)


@pytest.mark.parametrize("size", [None, 4])
def test_offloaded_reward_is_planned_while_the_fake_score_learns(tiny_pipeline, size):
    """It is on the device from the first decoded target to its answer, and not while the generator learns."""
    reward = ContrastiveReward("package:assets/shapes/scorer")
    weights = sum(t.numel() * t.element_size() for t in [*reward.sketch().parameters(), *reward.sketch().buffers()])
    phases = {}
    for place in ("cpu", "offloaded"):
        options = {"reward": reward, "memory": Memory(reward=place), "speed": OVERLAP, "micro_batch_size": size}
        phases[place] = plan(tiny.module(tiny_pipeline, GDMD, **options), 8).phases
    more = {name: phases["offloaded"][name] - found for name, found in phases["cpu"].items()}
    during = {name: more.pop(name) for name in ("decoding", "reward", "fake_score forward", "fake_score backward")}
    assert set(during.values()) == {weights}
    assert 0 < more.pop("optimizer step") <= weights  # of the two roles' steps the larger counts
    assert set(more.values()) == {0}


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (DMD, {}, "DMD does not offer it; use false"),
        (GNDMR, {"reward": Liking()}, "GNDMR does not offer it"),
        (GDMD, {"matching": Matching(fake_score_samples="fresh")}, "with fresh samples the fake score learns from"),
    ],
)
def test_what_cannot_overlap_is_refused_before_anything_is_loaded(tiny_pipeline, monkeypatch, method, options, message):
    monkeypatch.setattr(tiny.SD3Family, "load", None)
    module = tiny.module(tiny_pipeline, method, speed=OVERLAP, **options)
    module._trainer = SimpleNamespace(precision="32-true", max_steps=1, datamodule=None, world_size=1, strategy=None)
    with pytest.raises(UserError, match=rf"^model\.speed\.overlap_reward: {message}"):
        module.setup("fit")
