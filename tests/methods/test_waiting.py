"""An update waits for the device only where a reward is checked: followed through every operation, as on a GPU.

Numbers that would be on a GPU are weights, noise and all that is computed from them. Python waits for one when it reads
its value, or when the shape of a result depends on values.
"""

import traceback

import pytest
import torch
from test_cost_table import EXAMPLE, ROWS, world_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from world import Liking

from gdmd_lightning import streams

WAITS = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.is_nonzero",
    "aten.masked_select",
    "aten.equal",
    "aten._uniq",
)


class Waits(TorchDispatchMode):
    """Where values on the device are read, as files and functions of this project."""

    def __init__(self, on_device) -> None:
        super().__init__()
        self.found: list[str] = []
        for tensor in on_device:
            tensor.on_device = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        outputs = function(*args, **(kwargs or {}))
        if any(hasattr(value, "on_device") for value in inputs):
            masks = [value for value in tree_flatten(args[1:])[0] if getattr(value, "dtype", None) == torch.bool]
            if str(function).startswith(WAITS) or ("aten.index" in str(function) and masks):
                calls = [call for call in traceback.extract_stack() if "/gdmd_lightning/" in call.filename]
                self.found.append(calls[-1].name if calls else "outside")
            for value in tree_flatten(outputs)[0]:
                if isinstance(value, torch.Tensor):
                    value.on_device = True
        return outputs


def waits(world, monkeypatch) -> list[str]:
    draw, drawn = streams.torch.randn, []

    def marked(*shape, **options):
        drawn.append(draw(*shape, **options))
        drawn[-1].on_device = True
        return drawn[-1]

    monkeypatch.setattr(streams.torch, "randn", marked)
    with Waits([*world.roles.parameters(), *world.roles.buffers()]) as mode:
        world.update()
    assert drawn
    return mode.found


@pytest.mark.parametrize("name", ROWS)
def test_an_update_waits_only_where_a_reward_is_checked(name, monkeypatch):
    reward = Liking()
    found = waits(world_of(name, EXAMPLE, reward), monkeypatch)
    once = ["_check_clipping"] if reward.asked and "_check_clipping" in found else []
    assert sorted(found) == sorted([*once, *["_check_finite"] * len(reward.asked)])


def test_a_value_that_is_read_is_found(monkeypatch):
    world = world_of("DMD", EXAMPLE, Liking())
    velocity = world.module.roles.velocity

    def reading(role, latents, **options):
        found = velocity(role, latents, **options)
        found.mean().detach().item()
        return found

    monkeypatch.setattr(world.module.roles, "velocity", reading)
    assert len(waits(world, monkeypatch)) > 3
