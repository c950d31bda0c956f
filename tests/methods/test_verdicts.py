"""Verdicts: which targets are compared, and what must not change the outcome."""

from itertools import product
from typing import get_args

import pytest
import torch
from gdmd_lightning.methods.targets import Targets
from gdmd_lightning.methods.verdicts import Judged, Verdict, correlation
from torch import Tensor

from gdmd_lightning.objectives.advantages import Spread
from gdmd_lightning.objectives.policy import gradient_weight, optimality
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.samplers import State

BATCH, SIZE = 6, 4
PROMPTS = PromptBatch(tuple(Prompt(text) for text in "aabbcc"), group_size=2).groups
COMPARISONS = ("state", "prompt", "sample")
ALL = [
    Verdict(compare, spread, centre)  # type: ignore[arg-type]
    for compare, spread, centre in product(COMPARISONS, get_args(Spread), (False, True))
]
UNCENTRED = [verdict for verdict in ALL if not verdict.centre_levels]


def rewards(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of the targets ``[B, M]`` and of the samples ``[B]``."""
    stream = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, SIZE, generator=stream, dtype=torch.float64),
        torch.randn(BATCH, generator=stream, dtype=torch.float64),
    )


def name(verdict: Verdict) -> str:
    return f"{verdict.compare}-{verdict.spread}-{'centred' if verdict.centre_levels else 'plain'}"


every = pytest.mark.parametrize("verdict", ALL, ids=name)
uncentred = pytest.mark.parametrize("verdict", UNCENTRED, ids=name)


@every
def test_a_constant_added_to_all_rewards_changes_nothing(verdict: Verdict) -> None:
    r, own = rewards()
    torch.testing.assert_close(verdict.advantages(r + 5, own + 5, PROMPTS), verdict.advantages(r, own, PROMPTS))


@every
def test_states_of_a_prompt_may_change_places(verdict: Verdict) -> None:
    r, own = rewards()
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    torch.testing.assert_close(
        verdict.advantages(r[order], own[order], PROMPTS), verdict.advantages(r, own, PROMPTS)[order]
    )


@every
def test_ranks_may_change_places(verdict: Verdict) -> None:
    r, own = rewards()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        verdict.advantages(r[:, order], own, PROMPTS), verdict.advantages(r, own, PROMPTS)[:, order]
    )


@uncentred
def test_targets_of_one_state_may_change_places(verdict: Verdict) -> None:
    r, own = rewards()
    mixed = r.clone()
    mixed[2] = r[2].flip(0)
    expected = verdict.advantages(r, own, PROMPTS).clone()
    expected[2] = expected[2].flip(0)
    torch.testing.assert_close(verdict.advantages(mixed, own, PROMPTS), expected)


@pytest.mark.parametrize("compare", COMPARISONS)
@pytest.mark.parametrize("spread", get_args(Spread))
def test_rewards_without_spread_give_every_gradient_weight_one(compare: str, spread: Spread) -> None:
    flat = torch.full((BATCH, SIZE), 0.75, dtype=torch.float64)
    advantage = Verdict(compare, spread).advantages(flat, flat[:, 0], PROMPTS)  # type: ignore[arg-type]
    assert torch.equal(gradient_weight(optimality(advantage, 2.0), 4.0), torch.ones_like(flat))


@pytest.mark.parametrize("spread", get_args(Spread))
def test_targets_of_a_state_are_compared_with_each_other_alone(spread: Spread) -> None:
    r, _ = rewards()
    better = r + torch.arange(BATCH, dtype=torch.float64)[:, None]
    verdict = Verdict("state", spread)
    torch.testing.assert_close(verdict.advantages(better, None, PROMPTS), verdict.advantages(r, None, PROMPTS))


def test_targets_of_a_prompt_are_compared_across_its_states() -> None:
    r, _ = rewards()
    r[1] = r[0] + 10
    advantage = Verdict("prompt", "none").advantages(r, None, PROMPTS)
    assert (advantage[0] < 0).all()
    assert (advantage[1] > 0).all()


def test_prompts_are_not_compared_with_each_other() -> None:
    r, _ = rewards()
    harder = r - PROMPTS[:, None]
    for verdict in (Verdict("prompt", spread) for spread in get_args(Spread)):
        torch.testing.assert_close(verdict.advantages(harder, None, PROMPTS), verdict.advantages(r, None, PROMPTS))


def test_a_target_as_good_as_its_sample_has_no_advantage() -> None:
    r, own = rewards()
    r[:, 1] = own
    advantage = Verdict("sample").advantages(r, own, PROMPTS)
    assert torch.equal(advantage[:, 1], torch.zeros(BATCH, dtype=torch.float64))
    assert torch.equal(advantage > 0, r > own[:, None])


@pytest.mark.parametrize("compare", ["state", "prompt"])
@pytest.mark.parametrize("spread", get_args(Spread))
def test_centred_levels_hide_what_all_targets_of_a_level_share(compare: str, spread: Spread) -> None:
    r, _ = rewards()
    blurred = r + torch.tensor([0.0, 3.0, -1.0, 8.0], dtype=torch.float64)
    verdict = Verdict(compare, spread, centre_levels=True)  # type: ignore[arg-type]
    torch.testing.assert_close(verdict.advantages(blurred, None, PROMPTS), verdict.advantages(r, None, PROMPTS))


def test_without_centring_the_levels_are_ranked() -> None:
    r, _ = rewards()
    blurred = 0.01 * r + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    advantage = Verdict("state").advantages(blurred, None, PROMPTS)
    assert (advantage.diff(dim=1) > 0).all()


@pytest.mark.parametrize("compare", ["state", "prompt"])
def test_a_verdict_among_targets_needs_no_judged_samples(compare: str) -> None:
    verdict = Verdict(compare)  # type: ignore[arg-type]
    assert not verdict.asks_for_samples
    verdict.advantages(rewards()[0], None, PROMPTS)


def test_samples_are_judged_where_asked_for_or_needed() -> None:
    assert Verdict("state", score_samples=True).asks_for_samples
    assert Verdict("sample").asks_for_samples


def judged() -> Judged:
    x = torch.zeros(2, 1, 4, 4)
    targets = Targets(
        x[:, None].repeat(1, 3, 1, 1, 1), torch.rand(2, 3), torch.zeros(3, dtype=torch.long), torch.ones(2, 3)
    )
    o = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.5, 0.75]])
    state = State(x, torch.ones(2), torch.zeros(2, dtype=torch.long))
    return Judged(state, x, targets, o, None, o - 0.5, o, (Prompt("a"), Prompt("b")), 1.5, torch.ones(2, 3))


def test_the_recorded_weight_is_the_full_forms_first_order() -> None:
    expected = torch.tensor([[-2.0, 1.0, 4.0], [-0.5, 1.0, 2.5]])
    torch.testing.assert_close(judged().weight(), expected)


def test_a_record_without_pictures_keeps_every_number() -> None:
    whole = judged()
    small = whole.without_pictures()
    assert small.x.numel() == small.state.x_sigma.numel() == small.targets.y.numel() == 0
    assert torch.equal(small.weight(), whole.weight())
    assert torch.equal(small.targets.level, whole.targets.level)
    assert torch.equal(small.state.level, whole.state.level)


def test_correlation_is_pearsons() -> None:
    a, b = (t.flatten() for t in (rewards(0)[0], rewards(1)[0]))
    assert correlation(a, b) == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item())
    assert correlation(a, 3 * a - 2) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)


def test_a_constant_correlates_with_nothing() -> None:
    a = rewards()[0]
    assert correlation(a, torch.full_like(a, 0.3)) == pytest.approx(0, abs=1e-6)
