"""A trace counts what is alive: by hand for a linear layer, views once, freed tensors no longer."""

import pytest
import torch
from torch import nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from gdmd_lightning.planning.trace import Autocast, FusedAttention, MetaShapes, Trace

FLOAT = 4


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_trace_of_a_linear_layer_equals_the_count_by_hand(device):
    batch, width, out = 5, 7, 3
    layer = nn.Linear(width, out, device=device)
    weights = (width * out + out) * FLOAT
    trace = Trace(device)
    trace.hold(layer)
    assert trace.current == weights
    with trace:
        x = torch.zeros(batch, width, device=device)
        y = layer(x)
        assert trace.current == weights + (batch * width + batch * out) * FLOAT
        loss = y.sum()
        del y
        with trace.phase("backward"):
            loss.backward()
        del x, loss
    assert trace.current == 2 * weights
    assert trace.phases["backward"] <= trace.peak


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_trace_counts_views_once_and_drops_freed_tensors(device):
    with Trace(device) as trace:
        x = torch.empty(10, 10, device=device)
        view = x.view(100)[5:].unsqueeze(0)
        assert trace.current == 100 * FLOAT
        del x
        assert trace.current == 100 * FLOAT
        del view
        assert trace.current == 0
        assert trace.peak == 100 * FLOAT


def test_trace_does_not_count_a_view_of_a_held_tensor():
    layer = nn.Linear(4, 4, device="meta")
    trace = Trace()
    trace.hold(layer)
    held = trace.current
    with trace:
        turned = layer.weight.t()
        assert trace.current == held
    assert turned.shape == (4, 4)


def test_nested_trace_phases_both_see_the_peak():
    with Trace() as trace:
        with trace.phase("outer"):
            with trace.phase("inner"):
                torch.empty(8, device="meta")
            torch.empty(2, device="meta")
        torch.empty(100, device="meta")
    assert trace.phases == {"outer": 8 * FLOAT, "inner": 8 * FLOAT}
    assert trace.peak == 100 * FLOAT


def test_trace_ignores_other_devices():
    with Trace() as trace:
        torch.empty(1000)
    assert trace.peak == 0


def by_name(query, key, value):
    """As diffusers' ``dispatch_attention_fn`` calls it, for FLUX.2."""
    return F.scaled_dot_product_attention(query=query, key=key, value=value, attn_mask=None)


def halves_added(x):
    """Sum of the halves of a hidden tensor, each of which has a gradient of the size of the whole."""
    y = x * 2
    half = len(y) // 2
    return get_gradient_edge((y[:half] + y[half:]).sum())


def test_gradients_of_several_uses_are_added_in_place():
    """Their sum takes no third tensor: without a dispatch mode, autograd adds to the first."""
    with Trace() as trace:
        x = torch.empty(1000, device="meta", requires_grad=True)
        torch.autograd.backward(halves_added(x), torch.ones((), device="meta"))
    assert trace.peak == pytest.approx(3 * 1000 * FLOAT, rel=0.01)  # x and two gradients
    assert trace.current == 2 * 1000 * FLOAT


def test_sum_in_a_forward_pass_within_a_backward_pass_is_counted():
    """As where blocks are computed again."""
    seen = []

    class Again(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                a, b = torch.empty(1000, device="meta"), torch.empty(1000, device="meta")
                before, trace.peak = trace.current, 0
                a = a + b
                seen.append(trace.peak - before)
            return grad

    with Trace() as trace:
        x = torch.empty(1000, device="meta", requires_grad=True)
        torch.autograd.backward(get_gradient_edge(Again.apply(x).sum()), torch.ones((), device="meta"))
    assert seen == [1000 * FLOAT]


@pytest.mark.parametrize("attention", [F.scaled_dot_product_attention, by_name], ids=["by place", "by name"])
def test_fused_attention_does_not_hold_all_pairs(attention):
    q, k, v = (torch.empty(1, 2, 4096, 16, device="meta", requires_grad=True) for _ in range(3))
    pairs = 2 * 4096**2 * FLOAT
    with Trace() as plain:
        attention(q, k, v)
    with FusedAttention(), Trace() as fused:
        out = attention(q, k, v)
        torch.autograd.backward(get_gradient_edge(out.sum()), torch.ones((), device="meta"))
    assert plain.peak > pairs
    assert fused.peak < pairs / 10
    assert q.grad.shape == q.shape


def test_autocast_precisions_are_those_documented_for_cuda():
    layer, norm, conv = (part.to("meta") for part in (nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv1d(4, 4, 1)))
    with Autocast(torch.bfloat16):
        y = layer(torch.empty(2, 4, 8, device="meta"))
        z = norm(y)
        lower = [y, conv(z), y @ y.mT, F.gelu(y), F.scaled_dot_product_attention(z, z, z)]
        full = [z, torch.softmax(y, -1), y + z, F.mse_loss(y, y), y.square(), y.pow(2)]
    assert {t.dtype for t in lower} == {torch.bfloat16}
    assert {t.dtype for t in full} == {torch.float32}


def test_gradients_under_autocast_have_the_weights_precision():
    layer = nn.Linear(8, 8, device="meta")
    with Autocast(torch.bfloat16):
        loss = layer(torch.empty(2, 8, device="meta")).square().mean()
    loss.backward()
    assert layer.weight.grad.dtype == torch.float32


def test_repeated_operations_have_the_results_of_the_first():
    x = torch.empty(4, 6, device="meta").t()
    whole = torch.empty(4, 6, dtype=torch.int64, device="meta")
    aten = torch.ops.aten
    shapes = MetaShapes()
    for call in (
        lambda: shapes(aten.mul.Tensor, (x, x), {}),
        lambda: shapes(aten.mul.Tensor, (x.contiguous(), x.contiguous()), {}),
        lambda: shapes(aten.sum.dim_IntList, (x, [1]), {"keepdim": True}),
        lambda: shapes(aten.sum.dim_IntList, (x, [1]), {}),
        lambda: shapes(aten.add.Tensor, (whole, 1), {}),
        lambda: shapes(aten.add.Tensor, (whole, 1.0), {}),
        lambda: shapes(aten.cat.default, ([x, x], 1), {}),
        lambda: shapes(aten.native_layer_norm.default, (x.contiguous(), [4], None, None, 1e-5), {}),
    ):
        first, again = call(), call()
        for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (first, again)), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
            assert one.untyped_storage()._cdata != other.untyped_storage()._cdata
    assert shapes(aten.mul.Tensor, (x, x), {}).stride() == (1, 6)
    assert shapes(aten.mul.Tensor, (x.contiguous(), x.contiguous()), {}).stride() == (4, 1)
    assert shapes(aten.add.Tensor, (whole, 1), {}).dtype == torch.int64
    assert shapes(aten.add.Tensor, (whole, 1.0), {}).dtype == torch.float32


@pytest.mark.parametrize("view", [torch.ops.aten._unsafe_view.default, torch.ops.aten.view.default])
def test_views_are_never_repeated_as_tensors_of_their_own(view):
    x, shapes = torch.empty(4, 6, device="meta"), MetaShapes()
    for _ in range(3):
        assert shapes(view, (x, [24]), {}).untyped_storage()._cdata == x.untyped_storage()._cdata


def test_operations_in_place_and_on_real_tensors_are_always_called():
    x, real, shapes = torch.empty(4, device="meta"), torch.ones(4), MetaShapes()
    for k in range(3):
        assert shapes(torch.ops.aten.add_.Tensor, (x, x), {}) is x
        assert torch.equal(shapes(torch.ops.aten.add.Tensor, (real, k), {}), real + k)
