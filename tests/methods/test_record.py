"""The record of judged targets: weights, logs and what is kept without latents."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gdmd_lightning.methods.record import JudgedTargets, correlation
from gdmd_lightning.prompts import Prompt


def judged(sample_reward: Tensor | None = None) -> JudgedTargets:
    x = torch.zeros(2, 1, 4, 4)
    o = torch.tensor([[0.0, 0.5, 1.0], [0.25, 0.5, 0.75]])
    return JudgedTargets(
        prompts=(Prompt("a"), Prompt("b")),
        x=x,
        targets=x[:, None].repeat(1, 3, 1, 1, 1),
        sigma=torch.ones(2),
        renoise_sigma=torch.rand(2, 3, generator=torch.Generator().manual_seed(0)),
        snapshot=torch.zeros(3, dtype=torch.long),
        gradient=torch.ones(2, 3),
        rewards=o,
        sample_reward=sample_reward,
        advantages=o - 0.5,
        without_spread=torch.tensor(0.25),
        optimality=o,
        lambda_policy=1.5,
    )


def random(seed: int) -> Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_recorded_weight_is_the_first_order_of_the_full_form() -> None:
    torch.testing.assert_close(judged().weight(), torch.tensor([[-2.0, 1.0, 4.0], [-0.5, 1.0, 2.5]]))


def test_record_without_latents_keeps_every_number() -> None:
    whole = judged()
    small = whole.without_latents()
    assert small.x.numel() == small.targets.numel() == 0
    assert torch.equal(small.weight(), whole.weight())
    assert torch.equal(small.renoise_sigma, whole.renoise_sigma)
    assert torch.equal(small.sigma, whole.sigma)


def test_logs_count_negative_weights() -> None:
    assert judged().logs()["weight_negative"] == pytest.approx(2 / 6)


def test_logs_compare_targets_with_scored_samples() -> None:
    logs = judged(torch.tensor([0.25, 0.6])).logs()
    assert logs["targets_better"] == pytest.approx(3 / 6)
    assert logs["reward_sample"] == pytest.approx(0.425)


def test_logs_leave_out_samples_that_were_not_scored() -> None:
    assert not {"targets_better", "reward_sample"} & judged().logs().keys()


def test_spread_of_single_targets_is_that_of_the_batch() -> None:
    whole = judged()
    names = ("renoise_sigma", "gradient", "rewards", "advantages", "optimality")
    single = replace(whole, **{name: getattr(whole, name)[:, :1] for name in names})
    assert single.logs()["reward_spread"] == pytest.approx(0.25 / 2**0.5)  # of 0 and 0.25


def test_correlation_equals_pearsons() -> None:
    a, b = random(0), random(1)
    assert correlation(a, b) == pytest.approx(torch.corrcoef(torch.stack([a, b]))[0, 1].item())
    assert correlation(a, 3 * a - 2) == pytest.approx(1)
    assert correlation(a, -a) == pytest.approx(-1)


def test_correlation_with_a_constant_is_zero() -> None:
    a = random(0)
    assert correlation(a, torch.full_like(a, 0.3)) == pytest.approx(0, abs=1e-6)
