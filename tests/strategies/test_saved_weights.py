"""Graphs that keep no views of gathered weights give the gradients of those that do."""

import weakref
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gdmd_lightning.strategies.saved_weights import NoSavedWeights


class Half(nn.Module):
    """Uses a range of its weight, and one of its own next to a layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(8, 4)), nn.Parameter(torch.randn(4))
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.scale * self.layer(nn.functional.linear(x, self.weight[3:7]))


def network() -> nn.Module:
    torch.manual_seed(0)
    last = (nn.LayerNorm(4), nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2))
    return nn.Sequential(nn.Linear(6, 4), nn.SiLU(), Half(), *last)


def gather(parameters) -> list[torch.Tensor]:
    """Let parameters be ranges of one new tensor, as DeepSpeed gathers them; returns their values."""
    values = [each.detach().clone() for each in parameters]
    flat, start = torch.cat([each.flatten() for each in values]), 0
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = flat[start : start + value.numel()].view(value.shape)
        start += value.numel()
    return values


def release(parameters) -> None:
    for parameter in parameters:
        parameter.data = torch.empty(0)


def put(parameter, value, event, events) -> None:
    parameter.data = value
    events.append(event)


@pytest.fixture
def expected():
    net, x = network(), torch.randn(5, 6)
    net(x).square().sum().backward()
    return x, [each.grad for each in net.parameters()]


def test_gathered_weights_are_freed_and_gradients_are_the_same(expected):
    x, gradients = expected
    net = network()
    NoSavedWeights(net)
    parameters = list(net.parameters())
    values = gather(parameters)
    flat = weakref.ref(parameters[0].untyped_storage())
    loss = net(x).square().sum()
    release(parameters)
    assert flat() is None
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    gather(parameters[::-1])  # for the backward pass, in another order
    loss.backward()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_weight_that_is_not_gathered_in_the_backward_pass_is_gathered_for_the_moment(expected):
    x, gradients = expected
    net = network()
    NoSavedWeights(net)
    parameters, events = list(net.parameters()), []
    loss = net(x).square().sum()
    for parameter in parameters:
        parameter.ds_status = SimpleNamespace(name="NOT_AVAILABLE")
        parameter.all_gather = partial(put, parameter, parameter.data, "gathered", events)
        parameter.partition = partial(put, parameter, torch.empty(0), "released", events)
    release(parameters)
    (found,) = torch.autograd.grad(loss, parameters[:1])
    torch.testing.assert_close(found, gradients[0])
    assert events == ["gathered", "released"] * (len(events) // 2)
    assert events


def test_without_the_hooks_a_graph_keeps_what_was_gathered():
    """What this module is for; if torch keeps no views one day, it is not needed."""
    net = network()
    parameters = list(net.parameters())
    gather(parameters)
    flat = weakref.ref(parameters[0].untyped_storage())
    watched = NoSavedWeights(net)
    watched.remove()
    loss = net(torch.randn(5, 6)).square().sum()
    release(parameters)
    assert flat() is not None
    del loss


def test_checkpointed_blocks_and_errors_leave_nothing_behind(expected):
    x, gradients = expected
    net = network()
    watched = NoSavedWeights(net)
    with pytest.raises(RuntimeError):
        net(torch.randn(5, 7))
    assert watched._running == watched._calls == []
    inner = net[2].forward
    net[2].forward = lambda x: checkpoint(inner, x, use_reentrant=False)
    net(x).square().sum().backward()
    assert watched._running == watched._calls == []
    for parameter, gradient in zip(net.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
