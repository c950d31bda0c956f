"""What is logged in an update is what happened in it."""

import re
from pathlib import Path

import pytest
import tiny
import torch

from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.methods.ac_dmd import ACDMD
from gdmd_lightning.methods.advantages import JudgedSamples, TargetAdvantages
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.gndm import GNDM, GNDMR
from gdmd_lightning.methods.matching import MatchingModule
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.phases import Stopwatch
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.rewards.judge import Judge
from gdmd_lightning.roles import LoRA


def build(name: str, pipeline: Path, more: dict) -> DistillationModule:
    """One of the other methods on the tiny pipeline, with adapters."""
    lora, small = LoRA(4, 8), {"height": 32, "width": 32}
    family, matching = tiny.family(pipeline), Matching(fake_score_updates=2, interval="step")
    if name in ("flow_grpo", "nft"):
        return (FlowGRPO if name == "flow_grpo" else DiffusionNFT)(family, steps=3, lora=lora, **small, **more)
    if name.startswith("dmdr"):
        more = {**more, "joint": name.removeprefix("dmdr").strip() or "refl"}
    if name == "dmd2":
        more = {"images": ShapesImages()}
    kinds = {"dmd2": DMD2, "gndm": GNDM, "gndmr": GNDMR, "ac_dmd": ACDMD, "rtdmd": RTDMD}
    return kinds.get(name, DMDR)(family, matching=matching, lora=lora, **small, **more)


class Darkness(Reward):
    name = "darkness"
    differentiable = True

    def score(self, images, prompts):
        return 1 - images.mean((1, 2, 3))


def test_stopwatch_gives_each_phase_its_own_seconds(monkeypatch) -> None:
    clock = iter([0.0, 1.0, 4.0, 10.0, 10.0, 11.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    with watch("outside"), watch("inside"):
        pass
    with watch("inside"):
        pass
    assert watch.seconds == {"inside": 4.0, "outside": 7.0}


@pytest.mark.parametrize("method", [DMD, GDMD])
def test_logged_sample_std_is_that_of_the_generators_samples(tiny_pipeline, method, monkeypatch) -> None:
    samples = []
    whole = MatchingModule.train_fake_score

    def watched(self, batch, state, x0, learn):
        samples.append(x0.clone())
        return whole(self, batch, state, x0, learn)

    monkeypatch.setattr(MatchingModule, "train_fake_score", watched)
    logged = tiny.train(tiny.module(tiny_pipeline, method), 1).logged_metrics
    torch.testing.assert_close(logged["train/sample_std"], samples[0].std())


def test_parts_of_a_combined_reward_are_of_one_update() -> None:
    reward = CombinedReward([tiny.Brightness(), Darkness(), Darkness()], [1.0, 2.0, 0.0])
    judge = Judge(reward, Picture())  # type: ignore[arg-type]
    prompts = [Prompt("a"), Prompt("b")]
    total = judge(torch.ones(2, 3, 4, 4), prompts)
    assert total.tolist() == [10.0, 10.0]
    judge.each(torch.zeros(2, 3, 4, 4), prompts)
    assert judge.logs() == {"reward/brightness": 5, "reward/darkness": 0.5, "reward/darkness_3": 0.5}
    assert judge.logs() == {}
    alone = Judge(Darkness(), Picture())  # type: ignore[arg-type]
    alone(torch.ones(2, 3, 4, 4), prompts)
    assert alone.logs() == {}


class Picture:
    """A family whose latents are pictures."""

    def decode(self, latents):
        return latents


def test_logs_of_judged_samples_count_groups_and_clipped_advantages() -> None:
    advantages = torch.tensor([2.0, -2.0, 1.0, -1.0, 0.0, 0.0, 1.0, -1.0])
    rewards, groups = torch.tensor([1.0, 0, 1, 0, 3, 3, 0, 0]), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    logs = JudgedSamples(rewards, advantages, groups).logs(clip=2.0)
    assert logs == {"reward_sample": 1.0, "groups_without_spread": 0.25, "advantage_clipped": 0.25}


PAGE = Path(__file__).parents[2] / "docs" / "logs.md"
ROW = re.compile(r"^\| `([^`]+)` \|(?: ([^|`]+) \|)?", re.MULTILINE)
# Logged by callbacks, or where steps were skipped.
ELSEWHERE = {"eval/<score>/<task>", "teacher/<score>/<task>", "eval/seconds_per_picture", "train/skipped_steps"}
DEPENDS = {"train/advantage_clipped", "train/groups_without_spread"}
NAMES = {
    "DMD": "DMD", "GDMD": "GDMD", "ReFL": "ReFL", "dmd2": "DMD2", "gndm": "GNDM", "gndmr": "GNDMR", "ac_dmd": "AC-DMD",
    "dmdr": "DMDR", "dmdr grpo": "DMDR", "dmdr nft": "DMDR", "flow_grpo": "Flow-GRPO", "nft": "DiffusionNFT",
    "rtdmd": "RTDMD",
}  # fmt: skip
MATCHING = {"DMD", "DMD2", "DMDR", "GDMD", "GNDM", "GNDMR", "AC-DMD", "RTDMD"}
REWARDED = {"GDMD", "DMDR", "GNDMR", "RTDMD", "DiffusionNFT", "Flow-GRPO", "ReFL"}


def documented(method: str) -> set[str]:
    """The names that the page gives for a method."""
    found = set()
    for section in re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        title = section.split("\n", 1)[0]
        if (title == "Distribution matching" and method not in MATCHING) or (
            title == "Rewards" and method not in REWARDED
        ):
            continue
        for name, methods in ROW.findall(section):
            if title != "Terms" or _has(methods, method):
                found.add(name)
    return found


def _has(methods: str, method: str) -> bool:
    if methods.startswith("all but "):
        return method not in re.split(", | and ", methods.removeprefix("all but "))
    return method in REWARDED if methods == "all with a reward" else method in methods.split(", ")


def general(name: str) -> str:
    """A logged name as the page writes it."""
    name = re.sub(r"/(generator|fake_score|discriminator)(_forward|_backward)?$", r"/<role>\2", name)
    return re.sub(r"^train/reward/\w+$", "train/reward/<name>", name)


@pytest.mark.parametrize("name", NAMES)
def test_names_logged_are_exactly_those_on_the_page(tiny_pipeline, name) -> None:
    method, reward = NAMES[name], CombinedReward([tiny.Brightness(), Darkness()], [1.0, 0.5])
    more = {"reward": reward} if method in REWARDED else {}
    if method == "GDMD":
        more["advantages"] = TargetAdvantages(score_samples=True)
    kinds = {"DMD": DMD, "GDMD": GDMD, "ReFL": ReFL}
    module = tiny.module(tiny_pipeline, kinds[method], **more) if method in kinds else build(name, tiny_pipeline, more)
    metrics = tiny.train(module, 2, data={"batch_size": 4, "group_size": 2}).logged_metrics
    found, page = {general(name) for name in metrics}, documented(method)
    assert found - page == set()
    absent = {"dmdr": DEPENDS | {"train/clipped", "train/reward_loss"}, "dmdr nft": {"train/clipped"}}
    assert page - found == ELSEWHERE | absent.get(name, set())
    seconds = {name: float(value) for name, value in metrics.items() if name.startswith("train/seconds/")}
    assert min(seconds.values()) > 0
    assert sum(seconds.values()) == pytest.approx(float(metrics["train/seconds"]), rel=1e-5)
    if method == "GDMD":
        torch.testing.assert_close(metrics["loss"], metrics["train/dm_loss"] + metrics["train/policy_loss"])
    if method in REWARDED:
        # Parts are means before their weights: brightness of judged images is 10 times their mean, darkness 1 - mean.
        parts = metrics["train/reward/brightness"] / 10 + metrics["train/reward/darkness"]
        assert float(parts) == pytest.approx(1, abs=1e-5)
