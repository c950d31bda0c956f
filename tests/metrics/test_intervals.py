"""Bootstrap intervals: they cover at their stated rate, over the prompts that pictures belong to."""

import numpy as np
import pytest

from gdmd_lightning.metrics.intervals import Interval, Units, Value, bootstrap, intervals


def of(values, owners, tasks=None, parts=None, names=None):
    """Intervals of plain numbers."""
    parts, names = parts or [()] * len(values), names or [()] * len(values)
    found = [Value(value, tuple(mine)) for value, mine in zip(values, parts, strict=True)]
    return intervals(found, tasks or ["all"] * len(values), names, owners)


def test_interval_of_a_share_covers_it_at_its_stated_rate():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(60):
        sizes = rng.integers(1, 5, 80)
        sums = np.array([(rng.random(size) < rng.beta(7, 3)).sum() for size in sizes])
        interval = bootstrap([Units(sums, sizes)])
        assert interval.mean == pytest.approx(sums.sum() / sizes.sum())
        covered += interval.low <= 0.7 <= interval.high
    assert 50 <= covered <= 60


def test_interval_over_prompts_covers_where_one_over_pictures_does_not():
    rng, covered = np.random.default_rng(1), {"prompts": 0, "pictures": 0}
    owners = [prompt for prompt in range(50) for _ in range(9)]
    for _ in range(60):
        values = np.repeat((rng.random(50) < 0.5).astype(float), 9)
        for what, mine in (("prompts", owners), ("pictures", range(450))):
            interval = of(values, mine)["overall"]
            covered[what] += interval.low <= 0.5 <= interval.high
    assert covered["prompts"] >= 50
    assert covered["pictures"] <= 40


def test_equal_pictures_of_a_prompt_are_no_more_evidence_than_one():
    means = np.random.default_rng(0).random(40)
    one, ten = of(means, range(40)), of(np.repeat(means, 10), np.repeat(range(40), 10).tolist())
    for end in ("mean", "low", "high"):
        assert getattr(ten["overall"], end) == pytest.approx(getattr(one["overall"], end), abs=1e-12)
    assert ten["overall"].high - ten["overall"].low > 0.1
    assert of([0.25, 0.75], ["p", "p"])["overall"] == Interval(0.5, 0.5, 0.5)


def test_prompts_of_different_means_have_an_interval_whatever_their_sizes():
    assert of([1.0, 0.25, 0.25], ["p", "q", "q"])["overall"] == Interval(0.5, 0.25, 1.0)


def test_overall_is_the_mean_of_tasks_and_a_task_with_one_prompt_adds_no_spread():
    found = of([1.0, 0.0, 0.0, 1.0, 1.0], range(5), ["a", "b", "b", "b", "b"])
    assert found["a"] == Interval(1.0, 1.0, 1.0)
    assert found["b"].mean == 0.5
    assert found["b"].low < 0.5 < found["b"].high
    # Two pictures of each prompt are as good as one, in every task.
    pairs = of([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], [0, 1, 1, 2, 2, 3, 3, 4, 4], ["a"] + ["b"] * 8)
    assert pairs == found
    overall = found["overall"]
    assert (overall.mean, overall.low, overall.high) == pytest.approx(
        (0.75, 0.5 + found["b"].low / 2, 0.5 + found["b"].high / 2)
    )


def test_parts_are_averaged_by_name_and_resampled_with_their_prompt():
    parts, names = [(1.0, 0.0), (1.0,), (0.0, 0.0)], [("x", "y"), ("x",), ("x", "x")]
    found = of([0.0] * 3, ["p", "p", "q"], parts=parts, names=names)
    # Both of p, both of q, or one of each: never one picture of p without the other.
    assert found["x"] == Interval(0.5, 0.0, 1.0)
    assert found["y"] == Interval(0.0, 0.0, 0.0)
    assert list(found) == ["overall", "x", "y"]
