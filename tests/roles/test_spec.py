"""Role specs refuse contradictions, and optimizers follow their settings."""

import pytest
import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.roles import Optimization, RoleSpec
from gdmd_lightning.roles.spec import check_specs

GENERATOR = RoleSpec("generator", optimizer=Optimization())


@pytest.mark.parametrize(
    "kinds",
    [
        {},
        {"optimizer": Optimization(), "average_of": "generator"},
        {"average_of": "generator", "snapshot_of": "generator"},
        {"optimizer": Optimization(), "average_of": "generator", "snapshot_of": "generator"},
    ],
)
def test_role_spec_needs_exactly_one_kind(kinds):
    with pytest.raises(ValueError, match="role 'ema' must be trained, an average, or a snapshot"):
        RoleSpec("ema", **kinds)


@pytest.mark.parametrize("name", ["teacher", "a.b", ""])
def test_role_spec_refuses_a_name_that_state_dicts_cannot_hold(name):
    with pytest.raises(ValueError, match="cannot be the name of a role"):
        RoleSpec(name, optimizer=Optimization())


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_role_spec_refuses_a_decay_out_of_range(decay):
    with pytest.raises(ValueError, match=f"decay of role 'ema' is {decay}"):
        RoleSpec("ema", average_of="generator", decay=decay)


def test_role_spec_source_is_the_role_it_follows():
    assert GENERATOR.source is None
    assert RoleSpec("ema", average_of="generator").source == "generator"
    assert RoleSpec("past", snapshot_of="generator").source == "generator"


def test_check_specs_refuses_a_repeated_name():
    with pytest.raises(ValueError, match="role 'generator' is declared twice"):
        check_specs((GENERATOR, GENERATOR))


@pytest.mark.parametrize("source", ["nobody", "ema", "teacher"])
def test_check_specs_refuses_to_follow_a_role_that_is_not_trained(source):
    specs = (GENERATOR, RoleSpec("ema", average_of="generator"), RoleSpec("past", snapshot_of=source))
    with pytest.raises(ValueError, match=f"role 'past' follows '{source}', which is not trained"):
        check_specs(specs)


def test_optimization_warms_up_linearly_and_then_stays():
    optimizer = Optimization(learning_rate=0.8, warmup=4).optimizer([nn.Parameter(torch.zeros(1))])
    schedule = Optimization(learning_rate=0.8, warmup=4).scheduler(optimizer, -1)
    found = []
    for _ in range(6):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.8, 0.8])


@pytest.mark.parametrize("warmup", [0, 1])
def test_optimization_without_warmup_starts_at_its_learning_rate(warmup):
    settings = Optimization(learning_rate=0.5, warmup=warmup)
    optimizer = settings.optimizer([nn.Parameter(torch.zeros(1))])
    settings.scheduler(optimizer, -1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)


def test_fused_optimizer_equals_torchs_loop():
    """Up to rounding, over steps with another learning rate each."""
    settings = Optimization(learning_rate=3e-2, betas=(0.8, 0.95), weight_decay=0.1, warmup=4)
    random = torch.Generator().manual_seed(0)
    shapes = [(17, 9), (5,), (), (4, 3, 2, 2)]
    start = [torch.randn(shape, generator=random) for shape in shapes]
    mine, theirs = ([nn.Parameter(each.clone()) for each in start] for _ in range(2))
    fused = settings.optimizer(mine)
    loop = torch.optim.AdamW(theirs, lr=3e-2, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
    assert fused.param_groups[0]["fused"]
    schedules = [settings.scheduler(optimizer, -1) for optimizer in (fused, loop)]
    for _ in range(6):
        for one, other in zip(mine, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=random)
            other.grad = one.grad.clone()
        for optimizer, schedule in zip((fused, loop), schedules, strict=True):
            optimizer.step()
            schedule.step()
    for one, other, first in zip(mine, theirs, start, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(one, first, atol=1e-3)


def rates(settings: Optimization, updates: int) -> list[float]:
    """The learning rate in each update."""
    optimizer = settings.optimizer([nn.Parameter(torch.zeros(1))])
    schedule = settings.scheduler(optimizer, updates)
    found = []
    for _ in range(updates):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_linear_schedule_falls_from_the_end_of_the_warmup_to_the_last_update():
    settings = Optimization(learning_rate=8.0, warmup=3, schedule="linear")
    assert rates(settings, 10) == pytest.approx([8 / 3, 16 / 3, 8, 7, 6, 5, 4, 3, 2, 1])


def test_cosine_schedule_is_half_way_in_the_middle():
    settings = Optimization(learning_rate=2.0, warmup=0, schedule="cosine")
    assert rates(settings, 4) == pytest.approx([2, 1 + 0.5**0.5, 1, 1 - 0.5**0.5])


@pytest.mark.parametrize(("schedule", "expected"), [("linear", [4, 3.25, 2.5, 1.75]), ("cosine", [4, None, 2.5, None])])
def test_schedule_ends_at_the_final_factor(schedule, expected):
    settings = Optimization(learning_rate=4.0, warmup=1, schedule=schedule, final_learning_rate_factor=0.25)
    for found, rate in zip(rates(settings, 4), expected, strict=True):
        assert rate is None or found == pytest.approx(rate)
    assert settings.factor(4, 4) == settings.factor(9, 4) == pytest.approx(0.25)


def test_warmup_longer_than_the_run_only_rises():
    assert rates(Optimization(learning_rate=1.0, warmup=10, schedule="cosine"), 3) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_falling_schedule_needs_the_number_of_updates(schedule):
    message = rf"model\.critic\.schedule: a {schedule} schedule ends at trainer\.max_steps, which is -1; "
    with pytest.raises(UserError, match=message):
        Optimization(schedule=schedule).check("critic", -1)
    Optimization(schedule=schedule).check("critic", 10)
    Optimization().check("critic", -1)
