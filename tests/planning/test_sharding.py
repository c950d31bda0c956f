"""Bytes of a network under every strategy follow from the numbers of its parameters."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "distributed"))
from cases import build_any

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.planning.footprint import plan
from gdmd_lightning.planning.report import table
from gdmd_lightning.planning.sharding import Shape, Split, shapes_of
from gdmd_lightning.planning.strategy import read_strategy
from gdmd_lightning.roles import LoRA, Optimization

RANKS = [1, 2, 3, 8, 64]
SHAPES = [Shape(100, 100 * 30, 4), Shape(7, 7, 4), Shape(1, 1, 4)]
NUMBERS = 3008


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("kind", ["zero1", "zero2"])
def test_zero_1_and_2_hold_whole_weights_and_shares_of_what_the_optimizer_has(kind, ranks):
    split = Split(kind, ranks)
    share = -(-NUMBERS // (2 * ranks)) * 2
    assert split.weights(SHAPES) == 4 * share * ranks
    assert split.master(SHAPES) == 4 * share
    assert split.moments(SHAPES) == 8 * share
    assert split.gradients(SHAPES) == 0
    assert split.reduced(SHAPES) == (4 * share if kind == "zero2" else 0)


@pytest.mark.parametrize("ranks", RANKS)
def test_zero_3_holds_a_share_of_every_parameter(ranks):
    split, share = Split("zero3", ranks), -(-3000 // ranks) + -(-7 // ranks) + 1
    assert split.weights(SHAPES) == split.gradients(SHAPES) == 4 * share
    assert split.moments(SHAPES) == 8 * share
    assert split.master(SHAPES) == 4 * share
    assert Split("zero3", ranks, stays_whole=7).weights(SHAPES) == 4 * share + 4 * 8


@pytest.mark.parametrize("ranks", RANKS)
def test_fsdp2_holds_rows_of_every_parameter(ranks):
    split, share = Split("fsdp2", ranks), 30 * -(-100 // ranks) + -(-7 // ranks) + 1
    assert split.weights(SHAPES) == split.gradients(SHAPES) == 4 * share
    assert split.moments(SHAPES) == 8 * share
    assert split.master(SHAPES) == split.buckets() == 0


def test_shares_of_half_precision_are_half():
    half = [Shape(s.first, s.numel, 2) for s in SHAPES]
    for kind in ("whole", "zero3", "fsdp2"):
        assert 2 * Split(kind, 4).weights(half) == Split(kind, 4).weights(SHAPES)


def test_step_needs_a_flat_gradient_under_zero_and_nothing_under_fsdp2():
    zero = Split("zero2", 4)
    assert zero.stepping(SHAPES) == 4 * zero.shard(SHAPES)
    assert Split("fsdp2", 4).stepping(SHAPES) == 0


@pytest.mark.parametrize("kind", ["zero1", "zero2", "zero3"])
def test_offload_moves_what_the_optimizer_has_to_the_host(kind):
    here, away = Split(kind, 4), Split(kind, 4, offload_optimizer=True)
    assert (
        away.moments(SHAPES)
        == away.gradients(SHAPES)
        == away.reduced(SHAPES)
        == away.master(SHAPES)
        == away.stepping(SHAPES)
        == 0
    )
    assert away.weights(SHAPES) == here.weights(SHAPES)
    assert here.on_host(SHAPES) == 0
    assert away.on_host(SHAPES) == 4 * here.shard(SHAPES) * (5 if kind == "zero3" else 6)
    weights = Split("zero3", 4, offload_weights=True)
    assert weights.weights(SHAPES) == 0
    assert weights.on_host(SHAPES) == 4 * weights.shard(SHAPES)


def network() -> nn.Module:
    """Numbers: a first layer of 12, three blocks of 20, 20 and 42."""
    net = nn.Module()
    net.first = nn.Linear(3, 3)
    net.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4), nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 6))])
    return net


def test_gathered_weights_are_a_module_or_two_blocks():
    net = network()
    assert Split("zero2", 4).gathered(net, learned=True) == 0
    assert Split("zero3", 4).gathered(net, learned=True) == 2 * 4 * 30
    assert Split("zero3", 4, prefetch=5).gathered(net, learned=True) == 2 * 4 * 35
    assert Split("zero3", 4, prefetch=10**6).gathered(net, learned=True) == 2 * 4 * 94
    assert Split("fsdp2", 4).gathered(net, learned=False) == 4 * (12 + 2 * 42)
    assert Split("fsdp2", 4).gathered(net, learned=True) == 4 * (12 + 3 * 42)
    assert Split("fsdp2", 4).gathered(nn.Linear(3, 3), learned=True) == 4 * 24


def trainer(strategy="auto", devices="auto", nodes=1):
    return SimpleNamespace(strategy=strategy, devices=devices, num_nodes=nodes)


def deepspeed(**settings):
    pytest.importorskip("deepspeed")
    path = "gdmd_lightning.strategies.MultiEngineDeepSpeedStrategy"
    return SimpleNamespace(class_path=path, init_args=settings)


def fsdp2():
    return SimpleNamespace(class_path="gdmd_lightning.strategies.FSDP2Strategy", init_args={})


def test_ddp_and_one_gpu_are_told_apart(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    assert not read_strategy(trainer(), module).ddp
    assert not read_strategy(trainer(devices=1), module).ddp
    for settings in ({"devices": 2}, {"devices": "2"}, {"devices": [0, 3]}, {"nodes": 2}, {"strategy": "ddp"}):
        assert read_strategy(trainer(**settings), module).ddp
    assert read_strategy(trainer("ddp", 4, nodes=2), module).ranks == 8
    assert "as many GPUs as there are" in read_strategy(trainer("ddp"), module).words


def test_stages_of_roles_reach_their_averages_and_the_teacher(tiny_pipeline):
    module = tiny.module(tiny_pipeline, GDMD)
    given = deepspeed(stage=1, stages={"generator": 3}, config={"zero_optimization": {"reduce_bucket_size": 10}})
    found = read_strategy(trainer(given, 4, nodes=2), module)
    assert (found.ranks, found.per_host) == (8, 4)
    assert {name: split.kind for name, split in found.splits.items()} == {
        "teacher": "zero3", "generator": "zero3", "ema": "zero3", "old": "zero3", "fake_score": "zero1",
    }  # fmt: skip
    assert found.split_of("generator").stays_whole == 100_000
    assert found.split_of("ema").stays_whole == 0
    assert found.split_of("generator").bucket == found.split_of("fake_score").bucket == 10
    whole = read_strategy(trainer(deepspeed(stage=2, shard_frozen=False), 2), module)
    assert whole.split_of("teacher").kind == whole.split_of("ema").kind == "whole"


def test_what_deepspeed_decides_itself_is_planned_with_its_own_settings(tiny_pipeline):
    zero = {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "offload_optimizer": None}
    module = tiny.module(tiny_pipeline, DMD)
    usual = read_strategy(trainer(deepspeed(stage=2), 2), module)
    assert usual == read_strategy(trainer(deepspeed(stage=2, config={"zero_optimization": zero}), 2), module)
    split = usual.split_of("generator")
    assert (split.bucket, split.prefetch, split.stays_whole) == (500_000_000, 50_000_000, 100_000)
    assert not split.offload_optimizer
    overlapping = {"zero_optimization": {"overlap_comm": True}}
    twice = read_strategy(trainer(deepspeed(stage=2, config=overlapping), 2), module)
    assert twice.split_of("generator").bucket == 2 * split.bucket


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_parts_of_a_global_batch_need_the_number_of_gpus(tiny_pipeline, strategy):
    module = tiny.module(tiny_pipeline, DMD)
    with pytest.raises(UserError, match=r"it is 'auto', and a GPU's part of data\.global_batch_size depends on"):
        read_strategy(trainer(strategy), module, divided=True)
    assert read_strategy(trainer(strategy, 2), module, divided=True).ranks == 2


def test_a_single_gpu_is_one_gpu(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    for strategy in ("ddp", fsdp2(), deepspeed()):
        assert " on 1 GPU: " in read_strategy(trainer(strategy, 1), module).words


def test_adapters_leave_the_teacher_whole(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD, lora=LoRA(2, 4))
    found = read_strategy(trainer(deepspeed(stage=2), 2), module)
    assert {name: split.kind for name, split in found.splits.items()} == {"generator": "zero2", "fake_score": "zero2"}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (lambda: trainer(deepspeed(stage=3)), r"trainer\.devices: it is 'auto', and the share of a GPU depends on"),
        (lambda: trainer("fsdp", 2), "FSDPStrategy is not planned yet"),
        (lambda: trainer(deepspeed(stage=4), 2), "ZeRO stage 4"),
        (lambda: trainer(deepspeed(stages={"teacher": 1}), 2), "no role 'teacher' is trained"),
        (lambda: trainer(fsdp2()), r"trainer\.devices: it is 'auto', and the share of a GPU depends on"),
    ],
)
def test_what_cannot_be_planned_is_refused(tiny_pipeline, settings, said):
    with pytest.raises(UserError, match=said):
        read_strategy(settings(), tiny.module(tiny_pipeline, DMD))


def test_what_cannot_be_in_shards_is_refused(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD, lora=LoRA(2, 4))
    with pytest.raises(UserError, match="ZeRO 3 cannot shard the adapter"):
        read_strategy(trainer(deepspeed(stage=3), 2), module)
    eight = tiny.module(tiny_pipeline, DMD, generator=Optimization(algorithm="adamw_8bit"))
    with pytest.raises(UserError, match="moments of adamw_8bit cannot be split"):
        read_strategy(trainer(deepspeed(stage=1), 2), eight)
    with pytest.raises(UserError, match="moments of adamw_8bit cannot be split"):
        read_strategy(trainer(fsdp2(), 2), eight)


def planned(pipeline, strategy, ranks: int, **options):
    module = tiny.module(pipeline, DMD, **options)
    return plan(module, 4, strategy=read_strategy(trainer(strategy, ranks), module))


@pytest.mark.parametrize("ranks", [2, 8])
def test_plan_of_fsdp2_holds_shares_and_gathers(tiny_pipeline, ranks):
    alone = plan(tiny.module(tiny_pipeline, DMD), 4)
    split = planned(tiny_pipeline, fsdp2(), ranks)
    before = {c.name: c.size for c in alone.components}
    after = {c.name.removesuffix(f" (1/{ranks})"): c.size for c in split.components}
    assert before.keys() == after.keys()
    for name in ("teacher", "generator", "ema", "fake_score", "generator: gradients", "generator: optimizer states"):
        assert before[name] / ranks <= after[name] <= before[name] / ranks * 1.1 + 4096, name
    assert after["vae"] == before["vae"]
    assert split.phases["decoding" if "decoding" in split.phases else "rollout"] > 0


def test_plan_of_adapters_under_fsdp2_splits_only_the_network(tiny_pipeline):
    lora = LoRA(2, 4)
    alone = plan(tiny.module(tiny_pipeline, DMD, lora=lora), 4)
    split = planned(tiny_pipeline, fsdp2(), 2, lora=lora)
    before, after = ({c.name: c.size for c in found.components} for found in (alone, split))
    teacher = before.pop("teacher")
    assert teacher / 2 <= after.pop("teacher (1/2)") <= teacher / 2 * 1.1 + 4096
    assert before == after
    assert split.phases["rollout"] > alone.phases["rollout"]  # blocks are gathered


def test_plan_of_ddp_adds_a_copy_of_all_gradients(tiny_pipeline):
    found = {c.name: c.size for c in planned(tiny_pipeline, "ddp", 2).components}
    assert found["ddp: buckets of gradients"] == found["generator: gradients"] + found["fake_score: gradients"]


def test_plan_of_offload_reports_the_host(tiny_pipeline):
    config = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    found = planned(tiny_pipeline, deepspeed(stage=2, config=config), 2)
    assert not [c.name for c in found.components if "optimizer states" in c.name or "gradients (1" in c.name]
    shapes = shapes_of(tiny.family(tiny_pipeline).sketch().parameters())
    assert [(c.name, c.size) for c in found.host] == [
        (f"{role} (1/2)", Split("zero2", 2, offload_optimizer=True).on_host(shapes))
        for role in ("generator", "fake_score")
    ]
    assert "in the memory of the host, for each GPU" in table(found)


def test_weights_are_gathered_only_where_their_network_is_evaluated(tiny_pipeline):
    """Under ZeRO 1 only the teacher is in shards, and a loss's graph is alive when it is asked."""
    shards, whole = (planned(tiny_pipeline, deepspeed(stage=1, shard_frozen=frozen), 2) for frozen in (True, False))
    teacher = sum(s.numel * 4 for s in shapes_of(tiny.family(tiny_pipeline).sketch().parameters()))
    differences = {name: size - whole.phases[name] for name, size in shards.phases.items()}
    assert differences.pop("targets") == differences.pop("generator forward") == 2 * teacher
    assert set(differences.values()) == {0}


def test_gradients_in_shards_of_fsdp2_are_freed_before_a_backward_pass(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(Split, "gathered", lambda *_, **__: 0)
    alone, split = plan(tiny.module(tiny_pipeline, DMD), 4), planned(tiny_pipeline, fsdp2(), 2)
    shapes = shapes_of(tiny.family(tiny_pipeline).sketch().parameters())
    # Alone, whole gradients are among what stays in memory, and are freed too.
    freed = sum(s.numel * 4 for s in shapes) - Split("fsdp2", 2).gradients(shapes)
    for name in ("generator forward", "targets"):
        assert split.phases[name] - alone.phases[name] == freed, name
    assert split.phases["rollout"] == alone.phases["rollout"]
    left = split.phases["optimizer step"] - alone.phases["optimizer step"]  # what else is alive then differs a little
    assert abs(left) < Split("fsdp2", 2).gradients(shapes) / 2


def test_gradients_in_shards_are_counted_once_for_several_backward_passes(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(Split, "gathered", lambda *_, **__: 0)
    micro = {"micro_batch_size": 2}
    alone, split = plan(tiny.module(tiny_pipeline, DMD, **micro), 4), planned(tiny_pipeline, fsdp2(), 2, **micro)
    shard = Split("fsdp2", 2).gradients(shapes_of(tiny.family(tiny_pipeline).sketch().parameters()))
    assert abs(split.phases["optimizer step"] - alone.phases["optimizer step"]) < shard / 2


def test_a_head_on_a_network_in_shards_gathers_itself(tiny_pipeline, monkeypatch):
    asked = set()

    def gathered(split, network, learned):
        asked.add(type(network).__name__)
        return 0

    monkeypatch.setattr(Split, "gathered", gathered)
    module = build_any(tiny_pipeline, "dmd2", "sd3", lora=True)
    plan(module, 4, strategy=read_strategy(trainer(fsdp2(), 2), module))
    assert asked == {"SD3Transformer2DModel", "FeatureHead"}


def test_a_backward_pass_gathers_what_a_learned_network_needs(tiny_pipeline, monkeypatch):
    def gathered(split, network, learned):
        return split.weights_in_shards * (10**9 if learned else 10**7)

    monkeypatch.setattr(Split, "gathered", gathered)
    zero = deepspeed(stage=1, config={"zero_optimization": {"reduce_bucket_size": 2}})  # the teacher is in shards
    for strategy, learned in ((fsdp2(), 10**9), (zero, 0)):
        phases = planned(tiny_pipeline, strategy, 2).phases
        found = {name: size // 10**7 * 10**7 for name, size in phases.items()}
        evaluated = 10**7 if learned else 0
        assert found == {
            "rollout": evaluated, "generator forward": 10**7, "targets": 10**7, "generator backward": learned,
            "optimizer step": 0, "fake_score forward": evaluated, "fake_score backward": learned,
        }  # fmt: skip


def test_a_backward_pass_of_adapters_gathers_the_network_that_they_are_on(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(
        Split, "gathered", lambda split, *_, learned: split.weights_in_shards * (10**9 if learned else 10**7)
    )
    phases = planned(tiny_pipeline, fsdp2(), 2, lora=LoRA(2, 4)).phases
    assert {name for name, size in phases.items() if 10**7 <= size < 2 * 10**7} == phases.keys() - {"optimizer step"}


def test_buckets_of_gradients_exist_in_backward_passes(tiny_pipeline):
    small, large = (
        planned(tiny_pipeline, deepspeed(stage=1, config={"zero_optimization": {"reduce_bucket_size": size}}), 2)
        for size in (10**6, 10**7)
    )
    grown = {name for name, size in large.phases.items() if size - small.phases[name] == 4 * (10**7 - 10**6)}
    assert grown == {"generator backward", "fake_score backward"}


def test_gradients_in_zero_1_and_2_are_there_until_the_step(tiny_pipeline):
    bucket = {"zero_optimization": {"reduce_bucket_size": 2}}
    one, two = (planned(tiny_pipeline, deepspeed(stage=stage, config=bucket), 2) for stage in (1, 2))
    shapes = shapes_of(tiny.family(tiny_pipeline).sketch().parameters())
    whole = sum(s.numel * 4 for s in shapes)
    assert one.phases["optimizer step"] - two.phases["optimizer step"] == whole - Split("zero2", 2).shard(shapes) * 4
    assert one.phases["rollout"] == two.phases["rollout"]
