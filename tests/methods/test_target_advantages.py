"""Advantages of targets: which are compared, and what must not change the outcome."""

from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.advantages import TargetAdvantages
from gdmd_lightning.objectives.advantages import Spread
from gdmd_lightning.objectives.policy import gradient_weight, optimality
from gdmd_lightning.prompts import Prompt, PromptBatch

BATCH, SIZE = 6, 4
PROMPTS = PromptBatch(tuple(Prompt(text) for text in "aabbcc"), group_size=2).groups
COMPARISONS = ("state", "prompt", "sample")
ALL = [
    TargetAdvantages(compare, spread, center)  # type: ignore[arg-type]
    for compare, spread, center in product(COMPARISONS, get_args(Spread), (False, True))
    if compare != "sample" or spread == "batch"  # others would have no effect
]
UNCENTERED = [advantages for advantages in ALL if not advantages.center_strata]


def rewards(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Of the targets ``[B, M]`` and of the samples ``[B]``."""
    stream = torch.Generator().manual_seed(seed)
    return (
        torch.randn(BATCH, SIZE, generator=stream, dtype=torch.float64),
        torch.randn(BATCH, generator=stream, dtype=torch.float64),
    )


def name(advantages: TargetAdvantages) -> str:
    return f"{advantages.compare}-{advantages.spread}-{'centered' if advantages.center_strata else 'plain'}"


every = pytest.mark.parametrize("advantages", ALL, ids=name)
uncentered = pytest.mark.parametrize("advantages", UNCENTERED, ids=name)


@every
def test_advantages_ignore_a_constant_added_to_all_rewards(advantages: TargetAdvantages) -> None:
    r, own = rewards()
    torch.testing.assert_close(advantages(r + 5, own + 5, PROMPTS), advantages(r, own, PROMPTS))


@every
def test_advantages_follow_a_permutation_of_a_prompts_states(advantages: TargetAdvantages) -> None:
    r, own = rewards()
    order = torch.tensor([1, 0, 3, 2, 5, 4])
    torch.testing.assert_close(advantages(r[order], own[order], PROMPTS), advantages(r, own, PROMPTS)[order])


@every
def test_advantages_follow_a_permutation_of_the_strata(advantages: TargetAdvantages) -> None:
    r, own = rewards()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(advantages(r[:, order], own, PROMPTS), advantages(r, own, PROMPTS)[:, order])


@uncentered
def test_advantages_follow_a_permutation_of_one_states_targets(advantages: TargetAdvantages) -> None:
    r, own = rewards()
    mixed = r.clone()
    mixed[2] = r[2].flip(0)
    expected = advantages(r, own, PROMPTS).clone()
    expected[2] = expected[2].flip(0)
    torch.testing.assert_close(advantages(mixed, own, PROMPTS), expected)


@pytest.mark.parametrize("advantages", UNCENTERED)
def test_flat_rewards_give_every_gradient_weight_one(advantages: TargetAdvantages) -> None:
    flat = torch.full((BATCH, SIZE), 0.75, dtype=torch.float64)
    advantage = advantages(flat, flat[:, 0], PROMPTS)
    assert torch.equal(gradient_weight(optimality(advantage, 2.0), 4.0), torch.ones_like(flat))


@pytest.mark.parametrize("spread", get_args(Spread))
def test_compare_state_ignores_the_level_of_a_states_rewards(spread: Spread) -> None:
    r, _ = rewards()
    better = r + torch.arange(BATCH, dtype=torch.float64)[:, None]
    advantages = TargetAdvantages("state", spread)
    torch.testing.assert_close(advantages(better, None, PROMPTS), advantages(r, None, PROMPTS))


def test_compare_prompt_compares_across_the_prompts_states() -> None:
    r, _ = rewards()
    r[1] = r[0] + 10
    advantage = TargetAdvantages("prompt", "none")(r, None, PROMPTS)
    assert (advantage[0] < 0).all()
    assert (advantage[1] > 0).all()


def test_compare_prompt_ignores_the_level_of_a_prompts_rewards() -> None:
    r, _ = rewards()
    harder = r - PROMPTS[:, None]
    for advantages in (TargetAdvantages("prompt", spread) for spread in get_args(Spread)):
        torch.testing.assert_close(advantages(harder, None, PROMPTS), advantages(r, None, PROMPTS))


def test_compare_sample_gives_zero_to_a_target_as_good_as_its_sample() -> None:
    r, own = rewards()
    r[:, 1] = own
    advantage = TargetAdvantages("sample")(r, own, PROMPTS)
    assert torch.equal(advantage[:, 1], torch.zeros(BATCH, dtype=torch.float64))
    assert torch.equal(advantage > 0, r > own[:, None])


@pytest.mark.parametrize("compare", ["state", "prompt"])
@pytest.mark.parametrize("spread", get_args(Spread))
def test_center_strata_removes_what_all_targets_of_a_stratum_share(compare: str, spread: Spread) -> None:
    r, _ = rewards()
    blurred = r + torch.tensor([0.0, 3.0, -1.0, 8.0], dtype=torch.float64)
    advantages = TargetAdvantages(compare, spread, center_strata=True)  # type: ignore[arg-type]
    torch.testing.assert_close(advantages(blurred, None, PROMPTS), advantages(r, None, PROMPTS))


def test_without_center_strata_the_strata_are_ranked() -> None:
    r, _ = rewards()
    blurred = 0.01 * r + torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    advantage = TargetAdvantages("state")(blurred, None, PROMPTS)
    assert (advantage.diff(dim=1) > 0).all()


@pytest.mark.parametrize("compare", ["state", "prompt"])
def test_comparing_targets_needs_no_scored_samples(compare: str) -> None:
    advantages = TargetAdvantages(compare)  # type: ignore[arg-type]
    assert not advantages.needs_samples
    advantages(rewards()[0], None, PROMPTS)


def test_samples_are_scored_where_requested_or_needed() -> None:
    assert TargetAdvantages("state", score_samples=True).needs_samples
    assert TargetAdvantages("sample").needs_samples


SHAPES = list(product((1, 2, 3), (1, 2, 3), (1, 2, 3)))
"""Prompts, samples per prompt, targets per sample."""


@every
def test_check_refuses_exactly_the_shapes_in_which_every_advantage_is_0(advantages: TargetAdvantages) -> None:
    for prompts, group, size in SHAPES:
        stream = torch.Generator().manual_seed(prompts + 10 * group + 100 * size)
        groups = torch.arange(prompts).repeat_interleave(group)
        found = [
            advantages(
                torch.randn(prompts * group, size, generator=stream, dtype=torch.float64),
                torch.randn(prompts * group, generator=stream, dtype=torch.float64),
                groups,
            )
            for _ in range(5)
        ]
        always_zero = all((each == 0).all() for each in found)
        try:
            advantages.check(prompts * group, group, size)
            refused = False
        except UserError:
            refused = True
        assert refused == always_zero, (prompts, group, size)


def test_check_says_why_and_what_to_change() -> None:
    start = "the reward would have no effect: all advantages would be 0, because "
    for advantages, shape, expected in (
        (
            TargetAdvantages("prompt"),
            (8, 1, 1),
            f"model.advantages.compare: {start}each prompt has one target, which is compared with itself; "
            "use a larger model.targets.size or data.group_size, or model.lambda_policy 0",
        ),
        (
            TargetAdvantages("state"),
            (8, 4, 1),
            f"model.advantages.compare: {start}each state has one target, which is compared with itself; "
            "use a larger model.targets.size, or model.lambda_policy 0",
        ),
        (
            TargetAdvantages("prompt", center_strata=True),
            (1, 1, 4),
            f"model.advantages.center_strata: {start}the mean over the only sample of a batch is subtracted from it; "
            "use a larger data.batch_size, or set it to false",
        ),
    ):
        with pytest.raises(UserError) as error:
            advantages.check(*shape)
        assert str(error.value) == expected


@pytest.mark.parametrize(("compare", "expected"), [("state", 0.5), ("prompt", 0.25), ("sample", 0.5)])
def test_without_spread_is_the_share_of_groups_whose_advantages_are_all_0(compare, expected) -> None:
    """Of the four prompts one is flat; of its samples and those of the others four of eight are."""
    groups = torch.arange(4).repeat_interleave(2)
    advantage = torch.tensor([[0.0, 0], [0, 0], [1, 0], [0, 0], [-1, 1], [0, 0], [0, 2], [1, -3]])
    assert TargetAdvantages(compare).without_spread(advantage, groups) == expected  # type: ignore[arg-type]
