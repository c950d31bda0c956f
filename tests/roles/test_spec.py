"""Role specs refuse contradictions, and optimizers follow their settings."""

import pytest
import torch
from torch import nn

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
    schedule = Optimization(learning_rate=0.8, warmup=4).schedule(optimizer)
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
    settings.schedule(optimizer)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5)
