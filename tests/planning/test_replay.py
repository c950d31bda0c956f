"""Following one of several equal blocks finds what following all of them finds, to the byte."""

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Memory
from gdmd_lightning.planning import footprint
from gdmd_lightning.planning.footprint import plan
from gdmd_lightning.planning.replay import Replay, drop_gradient
from gdmd_lightning.planning.trace import Trace
from gdmd_lightning.roles import LoRA

META = torch.device("meta")
RECOMPUTED = Memory(gradient_checkpointing=True, vae_slicing=True)


class Block(nn.Module):
    """Keeps its input and an intermediate result, twice as wide, for the backward pass."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.wide, self.act = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU()
        self.narrow, self.out, self.end = nn.Linear(2 * width, width), nn.Linear(width, width), nn.Identity()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.end(x + self.out(self.narrow(self.act(self.wide(self.norm(x))))))


class Network(nn.Module):
    def __init__(self, depth: int, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def network(depth: int, width: int = 8) -> Network:
    return Network(depth, width).to(META)


def followed(net: Network, batch: int, *, repeat: bool, passes: int = 1, gradient: bool = True) -> tuple[int, int, int]:
    """Peaks of the forward and of the backward passes, and bytes at the end."""
    for parameter in net.parameters():
        parameter.grad = None
    trace = Trace()
    trace.hold(net)
    replay = Replay(trace, f"test {batch} {passes}")
    with torch.set_grad_enabled(gradient), trace, replay.of([net] if repeat else []):
        x = torch.empty(batch, 8, device=META, requires_grad=True)
        loss = sum(net(x).sum() for _ in range(passes))
        forward = trace.peak
        if gradient:
            torch.autograd.backward(torch.autograd.graph.get_gradient_edge(loss), torch.ones_like(loss))
    return forward, trace.peak, trace.current


@pytest.mark.parametrize("depth", [2, 3, 4, 7])
@pytest.mark.parametrize("gradient", [True, False])
def test_replay_finds_the_peaks_of_following_every_block(depth, gradient):
    whole = followed(network(depth), 32, repeat=False, gradient=gradient)
    assert followed(network(depth), 32, repeat=True, gradient=gradient) == whole


@pytest.mark.parametrize("passes", [2, 3])
def test_replay_of_several_passes_in_one_graph_adds_to_gradients_once(passes):
    whole = followed(network(5), 16, repeat=False, passes=passes)
    assert followed(network(5), 16, repeat=True, passes=passes) == whole


def test_replay_follows_few_blocks_and_restores_the_network():
    net = network(9)
    followed(net, 24, repeat=True)
    assert sum(block.calls for block in net.blocks) == 2  # the first, and the last, whose backward comes first
    assert not any("forward" in vars(block) for block in net.blocks)
    net(torch.empty(3, 8, device=META))
    assert sum(block.calls for block in net.blocks) == 2 + 9


def test_replay_knows_blocks_of_another_width_or_with_frozen_weights_apart():
    for change in (lambda net: None, lambda net: net.requires_grad_(False)):
        net = network(4)
        change(net)
        whole = followed(net, 48, repeat=False)
        assert followed(net, 48, repeat=True) == whole
    wide = Network(4, 16).to(META)
    assert Replay(Trace())._structure(wide.blocks[0]) != Replay(Trace())._structure(network(1).blocks[0])


def test_dropped_gradients_are_never_all_alive():
    kept, dropped = network(6), network(6)
    for parameter in dropped.parameters():
        drop_gradient(parameter)
    size = sum(p.numel() * 4 for p in kept.parameters())
    ends = [followed(net, 8, repeat=repeat)[2] for net in (kept, dropped) for repeat in (True, False)]
    assert ends[0] == ends[1] == ends[2] + size == ends[3] + size
    assert followed(dropped, 8, repeat=True) == followed(dropped, 8, repeat=False)


def same(build, batch: int = 4, precision: str = "32-true") -> None:
    repeated, whole = (plan(build(), batch, precision, whole=whole) for whole in (False, True))
    assert repeated == whole


def test_plan_equals_that_of_all_blocks(tiny_pipeline):
    same(lambda: tiny.module(tiny_pipeline, GDMD))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("deep") / "pipeline", layers=6)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["copies", "lora"])
@pytest.mark.parametrize("memory", [Memory(), RECOMPUTED], ids=["", "recomputed"])
def test_plan_of_a_deep_network_equals_that_of_all_blocks(deep, lora, memory):
    same(lambda: tiny.module(deep, GDMD, lora=lora, memory=memory), 8, "bf16-mixed")
    same(lambda: tiny.module(deep, DMD, lora=lora, memory=memory, micro_batch_size=2), 8)


@pytest.mark.slow
@pytest.mark.parametrize("memory", [Memory(), RECOMPUTED], ids=["", "recomputed"])
@pytest.mark.parametrize("lora", [False, True], ids=["copies", "lora"])
@pytest.mark.parametrize("family", ["sd3", "sdxl", "flux2"])
def test_plan_of_every_family_and_method_equals_that_of_all_blocks(family, lora, memory, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "families")
    import test_method_runs as runs

    save = {"sd3": tiny.save_pipeline, "sdxl": tiny.save_sdxl, "flux2": tiny.save_flux2}[family]
    pipeline = save(tmp_path / "pipeline")

    def build(method):
        module = runs.build(method, family, pipeline, lora=lora)
        module.memory = replace(module.memory, gradient_checkpointing=memory.gradient_checkpointing)
        return module

    for method in ("gdmd", "dmd2", "rtdmd"):
        same(lambda method=method: build(method))


def test_plan_falls_back_on_following_everything(tiny_pipeline, monkeypatch):
    asked = []

    def follow(module, optimizers, samples, precision, strategy, *, repeat):
        asked.append(repeat)
        if repeat:
            raise footprint.NotRecorded
        return {"update": 1}

    monkeypatch.setattr(footprint, "follow_update", follow)
    plan(tiny.module(tiny_pipeline, DMD), 4)
    assert asked == [True, False]
