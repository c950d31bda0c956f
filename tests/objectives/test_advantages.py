"""Advantages of a group's rewards, and the changes of rewards that do not affect them."""

from typing import get_args

import pytest
import torch
from torch import Tensor

from gdmd_lightning.objectives.advantages import (
    Spread,
    center_within,
    decoupled_advantages,
    group_advantages,
    group_mean,
)
from gdmd_lightning.objectives.policy import gradient_weight, optimality

SPREADS = get_args(Spread)
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])


def rewards(seed: int = 0) -> Tensor:
    return torch.randn(len(GROUPS), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", SPREADS)
def test_group_advantages_average_zero_in_every_group(spread: Spread) -> None:
    mean = group_mean(group_advantages(rewards(), GROUPS, spread), GROUPS)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-14)


@pytest.mark.parametrize("spread", SPREADS)
def test_group_advantages_ignore_a_constant_added_to_all_rewards(spread: Spread) -> None:
    torch.testing.assert_close(
        group_advantages(rewards() + 17.0, GROUPS, spread), group_advantages(rewards(), GROUPS, spread)
    )


@pytest.mark.parametrize("spread", SPREADS)
def test_group_advantages_ignore_a_constant_added_to_one_group(spread: Spread) -> None:
    shifted = rewards() + torch.tensor([0.0, 5.0, -3.0], dtype=torch.float64)[GROUPS]
    torch.testing.assert_close(group_advantages(shifted, GROUPS, spread), group_advantages(rewards(), GROUPS, spread))


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_group_advantages_over_a_std_ignore_the_scale_of_rewards(spread: Spread) -> None:
    torch.testing.assert_close(
        group_advantages(3 * rewards(), GROUPS, spread), group_advantages(rewards(), GROUPS, spread)
    )


@pytest.mark.parametrize("spread", SPREADS)
def test_group_advantages_follow_a_permutation_of_rows(spread: Spread) -> None:
    order = torch.randperm(len(GROUPS), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        group_advantages(rewards()[order], GROUPS[order], spread), group_advantages(rewards(), GROUPS, spread)[order]
    )


@pytest.mark.parametrize("spread", SPREADS)
def test_group_advantages_of_equal_rewards_give_weight_one(spread: Spread) -> None:
    flat = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)[GROUPS]
    advantage = group_advantages(flat, GROUPS, spread)
    assert torch.equal(advantage, torch.zeros_like(flat))
    o = optimality(advantage)
    assert torch.equal(o, torch.full_like(flat, 0.5))
    assert torch.equal(gradient_weight(o, 5.0), torch.ones_like(flat))


@pytest.mark.parametrize("spread", SPREADS)
def test_group_advantages_of_a_flat_group_are_zero_next_to_other_groups(spread: Spread) -> None:
    mixed = rewards()
    mixed[GROUPS == 1] = 0.25
    advantage = group_advantages(mixed, GROUPS, spread)
    assert torch.equal(advantage[GROUPS == 1], torch.zeros(4, dtype=torch.float64))
    assert (advantage[GROUPS != 1] != 0).all()


@pytest.mark.parametrize("size", [2, 3, 4, 7])  # (r + r + r) / 3 is not r in float32
def test_group_advantages_of_equal_rewards_are_zero_despite_rounding(size: int) -> None:
    groups = torch.arange(2).repeat_interleave(size)
    values = torch.cat([torch.full((size,), 0.9), torch.rand(size, generator=torch.Generator().manual_seed(0))])
    assert torch.equal(group_advantages(values, groups, "batch")[:size], torch.zeros(size))


@pytest.mark.parametrize("difference", [1e-3, 0.1, 100.0])
def test_group_advantages_of_two_members_over_their_own_std_are_plus_and_minus_one(difference: float) -> None:
    values = torch.tensor([1.0, 1.0 + difference], dtype=torch.float64)
    advantage = group_advantages(values, torch.zeros(2, dtype=torch.long), "group")
    torch.testing.assert_close(advantage, torch.tensor([-1.0, 1.0], dtype=torch.float64))


def test_group_advantages_over_the_batch_std_keep_the_size_of_differences() -> None:
    values = torch.tensor([0.0, 0.1, 0.0, 1.0], dtype=torch.float64)
    advantage = group_advantages(values, torch.tensor([0, 0, 1, 1]), "batch")
    assert advantage[3] == pytest.approx(10 * advantage[1].item())


@pytest.mark.parametrize("spread", ["group", "batch"])
def test_group_advantages_over_a_std_have_unit_mean_square(spread: Spread) -> None:
    advantage = group_advantages(rewards(), GROUPS, spread)
    assert advantage.square().mean().sqrt() == pytest.approx(1.0)


def test_group_advantages_below_the_floor_are_zero() -> None:
    values = torch.tensor([1.0, 1.0 + 1e-6], dtype=torch.float64)
    one = torch.zeros(2, dtype=torch.long)
    assert (group_advantages(values, one, "group", floor=1e-4) == 0).all()
    assert (group_advantages(values, one, "group", floor=1e-8) != 0).all()


def test_center_within_removes_a_constant_per_stratum() -> None:
    strata = torch.arange(3).repeat(3)
    shared = torch.tensor([0.0, 10.0, -4.0], dtype=torch.float64)[strata]
    values = rewards()
    torch.testing.assert_close(center_within(values + shared, strata), center_within(values, strata))


def test_center_within_leaves_zero_mean_in_every_stratum() -> None:
    strata = torch.arange(3).repeat(3)
    mean = group_mean(center_within(rewards(), strata), strata)
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-15)


# Several rewards, each normalized on its own (GDPO).


@pytest.mark.parametrize("spread", SPREADS)
def test_decoupled_advantages_of_one_reward_are_the_joint_ones_up_to_the_batchs_scale(spread: Spread) -> None:
    joint = group_advantages(rewards(), GROUPS, spread)
    found = decoupled_advantages(rewards()[:, None], torch.tensor([2.5]), GROUPS, spread)
    torch.testing.assert_close(found, joint / joint.square().mean().sqrt())


def test_decoupled_advantages_do_not_depend_on_the_rewards_scales() -> None:
    two, weights = torch.stack([rewards(0), rewards(1)], dim=1), torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = decoupled_advantages(two, weights, GROUPS)
    torch.testing.assert_close(decoupled_advantages(two * torch.tensor([1.0, 1000.0]), weights, GROUPS), found)
    joint = group_advantages(two @ weights, GROUPS, "group")
    assert not torch.allclose(group_advantages(two @ (weights * torch.tensor([1.0, 1000.0])), GROUPS, "group"), joint)


def test_decoupled_advantages_are_the_weighted_sum_over_the_batchs_spread() -> None:
    two, weights = torch.stack([rewards(0), rewards(1)], dim=1), torch.tensor([1.0, -0.5], dtype=torch.float64)
    total = sum(w * group_advantages(two[:, k], GROUPS, "group") for k, w in enumerate(weights))
    torch.testing.assert_close(decoupled_advantages(two, weights, GROUPS), total / total.square().mean().sqrt())


def test_decoupled_advantages_tell_apart_what_sums_confuse() -> None:
    """Of (0, 2) and (2, 0) against rewards of different spreads the sum is the same, the advantage is not."""
    two = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.0, -2.0], [0.0, 4.0]], dtype=torch.float64)
    group, one = torch.zeros(4, dtype=torch.long), torch.ones(2, dtype=torch.float64)
    assert group_advantages(two.sum(1), group)[0] == group_advantages(two.sum(1), group)[1]
    found = decoupled_advantages(two, one, group)
    assert found[0] < found[1]


def test_decoupled_advantages_of_equal_rewards_are_zero() -> None:
    assert torch.equal(decoupled_advantages(torch.full((9, 2), 0.1), torch.ones(2), GROUPS), torch.zeros(9))
