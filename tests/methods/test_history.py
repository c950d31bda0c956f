"""Samples compared with the rewards that their prompts got in earlier updates."""

from dataclasses import dataclass

import pytest
import tiny
import torch
from torch import distributed, multiprocessing
from world import Liking, World, module_of, near, three_prompts

from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import Batch, Conditioning
from gdmd_lightning.methods.advantages import SampleAdvantages
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.dmdr import DMDR
from gdmd_lightning.methods.flow_grpo import FlowGRPO
from gdmd_lightning.methods.history import PromptHistory, RunningStatistics
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.methods.rtdmd import RTDMD
from gdmd_lightning.prompts import Prompt

FIRST = torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64)
SECOND = torch.tensor([4.0, 6.0, 7.0, 9.0], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 1, 1])
PROMPTS = tuple(Prompt(text) for text in "aabb")


@dataclass
class Says:
    """A judge with fixed answers, ``[B, R]``."""

    rewards: torch.Tensor
    weights: tuple[float, ...] = (1.0,)

    def __call__(self, x0, prompts):
        assert prompts == PROMPTS
        return self.combined(self.rewards)

    def combined(self, each):
        return (each * torch.tensor(self.weights)).sum(1)

    def each(self, x0, prompts):
        assert prompts == PROMPTS
        return self.rewards


def compare(settings, *updates, weights=(1.0,)):
    """Advantages of each update, with one history."""
    batch = Batch(PROMPTS, GROUPS, Conditioning(torch.zeros(4, 1, 1)))
    history, x0 = PromptHistory(), torch.zeros(4, 1, 1, 1, dtype=torch.float64)
    return [settings(Says(rewards, weights), x0, batch, history).advantages for rewards in updates]


def running(spread="group", rewards="jointly", **options) -> SampleAdvantages:
    return SampleAdvantages(spread, rewards, RunningStatistics(**options))


def test_prompt_with_too_few_rewards_is_compared_within_its_group():
    plain, both = (compare(s, FIRST[:, None]) for s in (SampleAdvantages("group"), running(at_least=3)))
    near(both[0], plain[0], rtol=0, atol=0)


@pytest.mark.parametrize("spread", ["group", "batch", "none"])
def test_prompt_is_compared_with_its_rewards_of_all_updates(spread):
    found = compare(running(spread, at_least=3), FIRST[:, None], SECOND[:, None])[1]
    a, b = torch.tensor([1.0, 3.0, 4.0, 6.0]).double(), torch.tensor([2.0, 2.0, 7.0, 9.0]).double()
    centered = torch.cat([SECOND[:2] - a.mean(), SECOND[2:] - b.mean()])
    group = torch.cat([a.std(correction=0).expand(2), b.std(correction=0).expand(2)])
    std = {"group": group, "batch": centered.square().mean().sqrt(), "none": torch.ones(())}[spread]
    near(found, centered / std)
    assert bool((found > 0).all())  # all are better than what their prompts got so far


def test_oldest_rewards_are_forgotten():
    found = compare(running("none", size=3, at_least=3), FIRST[:, None], SECOND[:, None])[1]
    near(found[:2], SECOND[:2] - torch.tensor([3.0, 4.0, 6.0]).mean())


def test_equal_rewards_of_a_group_count_against_its_past():
    same = torch.full((4, 1), 5.0, dtype=torch.float64)
    found = compare(running("none", at_least=3), FIRST[:, None], same)[1]
    near(found, torch.tensor([1.5, 1.5, 1.5, 1.5]))
    assert not compare(running("none", at_least=5), FIRST[:, None], same)[1].any()


def test_several_rewards_are_compared_with_their_own_past():
    first, second = (torch.stack([each, -100 * each.square()], dim=1) for each in (FIRST, SECOND))
    found = compare(running("group", "separately", at_least=3), first, second, weights=(1.0, 0.5))[1]
    total = sum(
        weight * compare(running("group", at_least=3), first[:, [k]], second[:, [k]])[1]
        for k, weight in enumerate((1.0, 0.5))
    )
    near(found, total / total.square().mean().sqrt())


def test_history_is_that_of_a_prompt_whatever_its_place_in_the_batch():
    history, settings = PromptHistory(), RunningStatistics(at_least=1)
    history.add(PROMPTS, FIRST[:, None], settings)
    (past,) = history.add(tuple(reversed(PROMPTS)), SECOND[:, None], settings)
    near(past.mean, torch.tensor([3.5, 3.5, 5.0, 5.0]))


def test_another_number_of_rewards_or_size_starts_again_or_keeps_the_latest():
    history = PromptHistory()
    history.add(PROMPTS, FIRST[:, None], RunningStatistics(size=8, at_least=1))
    (past,) = history.add(PROMPTS, SECOND[:, None], RunningStatistics(size=2, at_least=1))
    near(past.mean, torch.tensor([5.0, 5.0, 8.0, 8.0]))
    pasts = history.add(PROMPTS, torch.stack([SECOND, FIRST], 1), RunningStatistics(size=8, at_least=1))
    near(pasts[1].mean, torch.tensor([2.0, 2.0, 2.0, 2.0]))
    assert not history.add(PROMPTS, FIRST[:, None], RunningStatistics(size=8, at_least=3))[0].known.any()


METHODS = {
    "nft": (DiffusionNFT, {"steps": 3}),
    "flow_grpo": (FlowGRPO, {"steps": 3}),
    "dmdr, nft": (DMDR, {"joint": "nft"}),
    "dmdr, grpo": (DMDR, {"joint": "grpo"}),
    "rtdmd": (RTDMD, {}),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.usefixtures("float64")
def test_methods_compare_samples_with_their_prompts_past(name):
    method, options = METHODS[name]

    def gradients(settings):
        world = World(method, reward=Liking(), sample_advantages=settings, each=4, **options)
        found = [world.update()[1][0].gradient["shift"] for _ in range(2)]
        return world.module.history, found

    history, (first, second) = gradients(running(at_least=5))
    nothing, (plain_first, plain_second) = gradients(SampleAdvantages("group"))
    assert (len(history), len(nothing)) == (3, 0)
    assert history.state_dict()["counts"] == [8, 8, 8]
    near(first, plain_first, rtol=0, atol=0)
    assert not torch.allclose(second, plain_second, rtol=1e-3)


def test_resumed_run_continues_its_history_to_the_bit(tmp_path):
    def run(updates, **fit):
        settings = running(size=5, at_least=3)
        module = module_of(DiffusionNFT, reward=Liking(), steps=3, sample_advantages=settings)
        trainer = tiny.trainer(updates)
        trainer.fit(module, datamodule=three_prompts(tmp_path), **fit)
        trainer.save_checkpoint(tmp_path / f"{updates}.ckpt")
        return read_checkpoint(str(tmp_path / f"{updates}.ckpt"))

    whole = run(4)
    run(2)
    resumed = run(4, ckpt_path=tmp_path / "2.ckpt")
    assert whole["prompt_history"]["counts"] == [5, 5, 5]
    for part in ("prompt_history", "state_dict"):
        assert tiny.differing(whole[part], resumed[part]) == [], part


@pytest.mark.parametrize(("strength", "kept"), [(10.0, 5), (15.0, 2)])
def test_history_of_a_reward_with_other_settings_begins_again(tmp_path, recwarn, strength, kept):
    def run(updates, reward, **fit):
        settings = running(size=5, at_least=3)
        module = module_of(DiffusionNFT, reward=reward, steps=3, sample_advantages=settings)
        trainer = tiny.trainer(updates)
        trainer.fit(module, datamodule=three_prompts(tmp_path), **fit)
        trainer.save_checkpoint(tmp_path / f"{updates}.ckpt")
        return module.history.state_dict()["counts"]

    run(2, Liking())
    assert run(3, Liking(strength), ckpt_path=tmp_path / "2.ckpt") == [kept] * 3
    said = [each for each in recwarn if "the reward has other settings than in the checkpoint" in str(each.message)]
    assert len(said) == (strength != 10.0)


def test_history_of_an_earlier_version_is_continued():
    here = PromptHistory()
    here.add(PROMPTS, FIRST[:, None], RunningStatistics())
    older = {name: value for name, value in here.state_dict().items() if name != "reward"}
    resumed = PromptHistory()
    resumed.reward = "of some reward"
    resumed.load_state_dict(older)
    assert len(resumed) == 2


def test_malformed_history_is_refused():
    for state in ([], {"texts": ["a"], "counts": [1, 2], "rewards": [FIRST]}, {"texts": 1, "counts": 2, "rewards": 3}):
        with pytest.raises(UserError, match="its rewards of prompts are malformed"):
            PromptHistory().load_state_dict(state)


def test_more_rewards_than_are_remembered_cannot_be_required():
    with pytest.raises(UserError, match=r"running\.at_least: it is 9, but only 8 rewards are remembered"):
        RunningStatistics(size=8, at_least=9)


def _on_a_rank(rank, address, results):
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    history = PromptHistory()
    (past,) = history.add(PROMPTS, (FIRST, SECOND)[rank][:, None], RunningStatistics(size=8, at_least=3))
    torch.save((past.mean, history.state_dict()), f"{results}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_one_history(tmp_path):
    multiprocessing.spawn(_on_a_rank, (f"file://{tmp_path}/meet", str(tmp_path)), nprocs=2)
    (mean, state), (other, its) = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    near(mean, torch.tensor([3.5, 3.5, 5.0, 5.0]).repeat(2))  # the rows of both ranks
    near(other, mean)
    assert tiny.differing(state, its) == []
