"""What a plan says an update holds is what a real update's allocator says, within a fiftieth; the command says it."""

import gc
import json
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import tiny
import torch
import yaml
from torch.profiler import ProfilerActivity, profile, record_function

from gdmd_lightning.cli import main
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Memory
from gdmd_lightning.metrics.geneval2 import GenEval2Score
from gdmd_lightning.metrics.scores import GenEvalScore, RewardScore
from gdmd_lightning.planning import report
from gdmd_lightning.planning.footprint import Component, Plan, plan, size_of_scores
from gdmd_lightning.rewards.clip import CLIPScore, ContrastiveReward
from gdmd_lightning.roles import LoRA, Optimization

SECOND = "second update"


class Marked(pl.Callback):
    """Marks the second update in the profile: the first makes the optimizers' states and encodes the prompts."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == 1:
            self.mark = record_function(SECOND)
            self.mark.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index == 1:
            self.mark.__exit__(None, None, None)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return tiny.save_pipeline(tmp_path_factory.mktemp("larger") / "pipeline", layers=4, heads=4)


def measured(module, directory) -> int:
    """Bytes of the parameters and buffers, and the most that torch's allocator gave in addition in an update."""
    module.configure_model()
    parts = [p for p in module.family.loaded.components.values() if isinstance(p, torch.nn.Module)]
    tensors = [t for part in (module, *parts) for t in (*part.parameters(), *part.buffers())]
    weights = sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())
    prompts = directory / "prompts.txt"
    prompts.write_text("a red circle\ntwo blue squares\n")
    data = PromptDataModule(str(prompts), batch_size=8, group_size=4, shuffle_buffer=0)
    gc.collect()  # what an earlier test left would be freed, and counted as freed, during this profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        tiny.trainer(2, callbacks=[Marked()]).fit(module, datamodule=data)
    profiled.export_chrome_trace(str(directory / "trace.json"))
    events = json.loads((directory / "trace.json").read_text())["traceEvents"]
    (mark,) = (e for e in events if e["name"] == SECOND and e["ph"] == "X" and e["cat"] == "user_annotation")
    memory = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    before = memory[0]["args"]["Total Allocated"] - memory[0]["args"]["Bytes"]  # of earlier profiles in this process
    within = [e for e in memory if 0 <= e["ts"] - mark["ts"] <= mark["dur"]]
    return weights + max(e["args"]["Total Allocated"] for e in within) - before


@pytest.mark.slow
@pytest.mark.parametrize("method", [DMD, GDMD])
@pytest.mark.parametrize("size", [4, 2])
def test_plan_of_micro_batches_equals_the_measured_peak_within_two_percent(pipeline, tmp_path, method, size):
    found = measured(tiny.module(pipeline, method, micro_batch_size=size), tmp_path)
    planned = plan(tiny.module(pipeline, method, micro_batch_size=size), 8)
    assert planned.total == pytest.approx(found, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("method", [DMD, GDMD])
@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["copies", "lora"])
@pytest.mark.parametrize(
    "memory", [Memory(), Memory(gradient_checkpointing=True, vae_slicing=True)], ids=["", "saving"]
)
def test_plan_equals_the_measured_peak_within_two_percent(pipeline, tmp_path, method, lora, memory):
    found = measured(tiny.module(pipeline, method, lora=lora, memory=memory), tmp_path)
    planned = plan(tiny.module(pipeline, method, lora=lora, memory=memory), 8)
    assert planned.total == pytest.approx(found, rel=0.02)


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    return tiny.save_flux2(tmp_path_factory.mktemp("flux2") / "pipeline")


@pytest.mark.slow
@pytest.mark.parametrize("method", [DMD, GDMD])
@pytest.mark.parametrize("lora", [None, LoRA(4, 8)], ids=["copies", "lora"])
@pytest.mark.parametrize(
    "options",
    [{}, {"memory": Memory(gradient_checkpointing=True, vae_slicing=True)}, {"micro_batch_size": 2}],
    ids=["", "saving", "micro-batches"],
)
def test_plan_of_flux2_equals_the_measured_peak_within_two_percent(flux2, tmp_path, method, lora, options):
    def build():
        family = Flux2KleinFamily(str(flux2), max_sequence_length=16, text_layers=(1, 2))
        reward = {"reward": tiny.Brightness()} if method is GDMD else {}
        return method(family, height=32, width=32, lora=lora, **reward, **options)

    assert plan(build(), 8).total == pytest.approx(measured(build(), tmp_path), rel=0.02)


def sizes(planned) -> dict[str, int]:
    return {component.name: component.size for component in planned.components}


def test_plan_of_copies_follows_from_their_numbers(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    found = sizes(plan(module, 4))
    network = found["teacher"]
    learned = 4 * sum(p.numel() for p in module.roles.parameters_of("generator"))
    assert found["generator"] == found["fake_score"] == found["ema"] == network
    assert found["generator: gradients"] == found["fake_score: gradients"] == learned
    assert found["generator: optimizer states"] == 2 * learned
    assert "old" not in found


def test_plan_of_adapters_is_a_small_part_of_that_of_copies(tiny_pipeline):
    full, lora = (sizes(plan(tiny.module(tiny_pipeline, GDMD, lora=lora), 4)) for lora in (None, LoRA(2, 4)))
    assert lora["teacher"] == full["teacher"]
    for name in ("generator", "fake_score", "ema", "old", "generator: gradients"):
        assert 0 < lora[name] < full[name] / 5


def test_plan_of_8bit_moments_does_not_need_bitsandbytes(tiny_pipeline):
    eight = Optimization(algorithm="adamw_8bit")
    found = sizes(plan(tiny.module(tiny_pipeline, DMD, generator=eight), 4))
    parameters = tiny_network_sizes(tiny_pipeline)
    expected = sum(8 * n if n < 4096 else 2 * (n + 4 * -(-n // 256)) for n in parameters)
    assert found["generator: optimizer states"] == expected


def tiny_network_sizes(path) -> list[int]:
    return [parameter.numel() for parameter in tiny.family(path).sketch().parameters()]


def test_plan_leaves_out_a_reward_on_the_cpu(tiny_pipeline):
    judge = {"reward": ContrastiveReward("package:assets/shapes/scorer")}
    assert sizes(plan(tiny.module(tiny_pipeline, **judge), 4))["reward"] > 0
    assert "reward" not in sizes(plan(tiny.module(tiny_pipeline, memory=Memory(reward="cpu"), **judge), 4))


def test_offloaded_reward_is_planned_only_where_pictures_are_decoded(tiny_pipeline):
    judge = {"reward": ContrastiveReward("package:assets/shapes/scorer")}
    offloaded, none = (
        plan(tiny.module(tiny_pipeline, memory=Memory(reward=place), **judge), 4).phases
        for place in ("offloaded", "cpu")
    )
    decoding = none["decoding"] + bytes_of(judge["reward"].sketch())
    whole = max(none["generator forward"], decoding)  # pictures are decoded within it
    assert offloaded == {**none, "decoding": decoding, "generator forward": whole}


def test_plan_of_mixed_precision_differs_from_single(tiny_pipeline):
    single, mixed = (plan(tiny.module(tiny_pipeline, DMD), 8, p) for p in ("32-true", "bf16-mixed"))
    assert mixed.resident == single.resident
    assert mixed.phases["generator forward"] != single.phases["generator forward"]


def test_plan_refuses_another_precision(tiny_pipeline):
    with pytest.raises(UserError, match=r"trainer\.precision: '64-true' cannot be planned yet"):
        plan(tiny.module(tiny_pipeline), 4, "64-true")


@pytest.mark.parametrize(("short", "whole"), [(32, "32-true"), ("16", "16-mixed"), ("bf16", "bf16-mixed")])
def test_plan_knows_lightnings_short_names_of_precisions(tiny_pipeline, short, whole):
    found, expected = (plan(tiny.module(tiny_pipeline, DMD), 4, precision) for precision in (short, whole))
    assert found == expected


@pytest.mark.parametrize(
    ("settings", "refusal"),
    [
        (["--model=ReFL", "--model.reward=ShapesReward"], r"model\.reward: 'shapes' is not differentiable; "),
        (
            ["--model=ReFL", "--model.reward=tiny.Brightness", "--model.memory.reward=offloaded"],
            r"model\.memory\.reward: it is offloaded, but the backward pass through the reward needs its weights on",
        ),
        (
            ["--model.speed.overlap_reward=true", "--model.matching.fake_score_samples=fresh"],
            "model.speed.overlap_reward",
        ),
        (["--model.lora.rank=4", "--model.speed.compile=frozen"], r"model\.speed\.compile: with model\.lora "),
        (["--model=FlowGRPO", "--data.group_size=1"], r"data\.group_size: it is 1, but FlowGRPO compares"),
        (
            ["--trainer.strategy.class_path=FSDP2Strategy", "--trainer.devices=2", "--model.speed.channels_last=true"],
            "lay weights out themselves",
        ),
    ],
)
def test_plan_refuses_what_fit_refuses(fast_fit, settings, refusal):
    with pytest.raises(UserError, match=refusal):
        report.plan_of([*fast_fit, *settings])


def test_plan_command_prints_whether_it_fits(fast_fit, capsys):
    main(["plan", *fast_fit, "--gpu_memory", "40"])
    said = capsys.readouterr().out
    assert "fits in 40 GiB: yes" in said
    assert all(name in said for name in ("teacher", "fake_score", "vae", "generator backward", "peak in total"))


@pytest.mark.slow
def test_plan_command_prints_savings(fast_fit, capsys, monkeypatch):
    lora = "--model.lora.rank=2"
    monkeypatch.setattr(report, "SWITCHES", ((lora,), ("--model.memory.reward=accelerator",), ("--model.nothing=1",)))
    main(["plan", *fast_fit, "--gpu_memory", "1", "--data.group_size=2"])
    said = capsys.readouterr().out
    assert "fits in 1 GiB: no" in said
    assert f"GiB  {lora}\n" in said
    assert "--data.batch_size=4" in said
    assert "accelerator" not in said
    assert "nothing" not in said


@pytest.mark.parametrize(("method", "places"), [("ReFL", {"cpu"}), ("DMD", set())])
def test_savings_are_of_the_roles_and_the_reward_that_a_method_has(fast_fit, monkeypatch, method, places):
    eight, place = "--model.{}.algorithm=adamw_8bit", "--model.memory.reward="
    chosen = [switch for switch in report.SWITCHES if switch[0].startswith((place, eight.format("generator")))]
    monkeypatch.setattr(report, "SWITCHES", chosen)
    reward = "{class_path: ContrastiveReward, init_args: {path: 'package:assets/shapes/scorer'}}"
    arguments = [*fast_fit, f"--model={method}", *([f"--model.reward={reward}"] if places else [])]
    settings = parse(arguments, "plan")
    found = {saving.arguments for saving in report.savings(arguments, settings, report.plan_of(arguments), 2**40)}
    roles = ("generator",) if method == "ReFL" else ("generator", "fake_score")
    assert tuple(map(eight.format, roles)) in found
    assert {each[0].removeprefix(place) for each in found if each[0].startswith(place)} == places


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--trainer.strategy=fsdp"], "FSDPStrategy would not shard these networks"),
        (["--trainer.devices=-2"], r"trainer\.devices: it is '-2'"),
        (["--trainer.devices=auto", "--data.global_batch_size=16"], r"a GPU's part of data\.global_batch_size depends"),
    ],
)
def test_plan_refuses_what_fit_would_or_what_it_cannot_know(fast_fit, arguments, said):
    with pytest.raises(UserError, match=said):
        report.plan_of([*fast_fit, *arguments])


def test_plan_command_reports_shares_of_deepspeed(fast_fit, capsys):
    pytest.importorskip("deepspeed")
    config = "{zero_optimization: {offload_optimizer: {device: cpu}}}"
    strategy = ["--trainer.strategy=MultiEngineDeepSpeedStrategy", "--trainer.strategy.stages={fake_score: 3}"]
    strategy += [f"--trainer.strategy.configs={{generator: {config}}}", "--trainer.devices=4", "--trainer.num_nodes=2"]
    main(["plan", *fast_fit, *strategy, "--gpu_memory", "40"])
    said = capsys.readouterr().out
    assert "DeepSpeed, ZeRO 2 and 3 on 8 GPUs: largest share of a GPU" in said
    assert "teacher (1/8)" in said
    assert "fake_score: optimizer states (1/8)" in said
    assert "generator: optimizer states" not in said
    assert "generator (1/8)" in said.partition("in the memory of the host")[2]


@pytest.mark.parametrize(("devices", "said"), [(1, "16 samples"), (2, "8 samples")])
def test_plan_divides_the_global_batch_over_the_gpus(fast_fit, capsys, devices, said):
    batch = ["--data.batch_size=8", "--data.group_size=4", "--data.global_batch_size=16"]
    main(["plan", *fast_fit, *batch, f"--trainer.devices={devices}", "--trainer.strategy=ddp", "--gpu_memory", "40"])
    at_once = "in micro-batches of 8" if devices == 1 else "all at once"
    assert capsys.readouterr().out.startswith(f"{said} per update on each GPU, 4 per prompt, {at_once}\n")
    parts = ["--model.micro_batch_size=8"] if devices == 1 else []
    alone = report.plan_of([*fast_fit, f"--data.batch_size={16 // devices}", "--data.group_size=4", *parts])
    shared = report.plan_of([*fast_fit, *batch, f"--trainer.devices={devices}"])
    assert shared.phases == alone.phases


def test_plan_command_needs_the_number_of_gpus_for_shares(fast_fit):
    pytest.importorskip("deepspeed")
    strategy = "--trainer.strategy.class_path=MultiEngineDeepSpeedStrategy"
    with pytest.raises(UserError, match=r"trainer\.devices: it is 'auto'"):
        report.plan_of([*fast_fit, "--trainer.devices=auto", strategy])


CLIP = "openai/clip-vit-large-patch14"


def of_clip(name, dtype="float32"):
    reward = {"class_path": "CLIPScore", "init_args": {"path": CLIP, "name": name, "dtype": dtype}}
    return {"class_path": "RewardScore", "init_args": {"reward": reward}}


def evaluating(directory, *evaluations):
    """Arguments of a run with these evaluations, each a list of scores; their prompts need not exist."""
    callbacks = [
        {"class_path": "GenerationEvaluation", "init_args": {"scores": scores, "prompts": "absent.txt"}}
        for scores in evaluations
    ]
    path = directory / "evaluating.yaml"
    path.write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    return ["--config", str(path)]


def bytes_of(network) -> int:
    return sum(t.numel() * t.element_size() for t in (*network.parameters(), *network.buffers()))


def test_plan_has_a_phase_for_the_networks_of_an_evaluation(fast_fit, tmp_path, no_network):
    scores = [of_clip("half", "bfloat16"), {"class_path": "GenEvalScore"}]
    expected = bytes_of(CLIPScore(CLIP, dtype="bfloat16").sketch())
    with_evaluation, without = (report.plan_of([*fast_fit, *more]) for more in (evaluating(tmp_path, scores), []))
    assert list(with_evaluation.phases.items()) == [*without.phases.items(), ("evaluation", expected)]
    assert with_evaluation.components == without.components
    assert with_evaluation.total == without.resident + expected
    assert f"\nevaluation{expected / report.GIB:>65.2f}\n" in report.table(with_evaluation)


def test_of_two_evaluations_the_plan_counts_the_larger(fast_fit, tmp_path):
    one, two = [of_clip("a")], [of_clip("b", "bfloat16"), of_clip("c", "float16"), of_clip("d", "bfloat16")]
    found = report.plan_of([*fast_fit, *evaluating(tmp_path, one, two, one)]).phases["evaluation"]
    assert found == 3 * bytes_of(CLIPScore(CLIP, dtype="bfloat16").sketch())


def test_evaluation_of_sd3_places_its_detector_its_color_classifier_and_hps(no_network):
    (scores,) = report._evaluations(parse(["--config", "sd3.yaml"], "plan"))
    detector, classifier, hps = 68_741_083, 427_616_513, 986_109_440
    assert size_of_scores(scores) == pytest.approx(4 * (detector + classifier) + 2 * hps, rel=0.001)


def test_scores_sketch_the_networks_that_they_place():
    network = torch.nn.Linear(3, 2, device="meta")
    asked = SimpleNamespace(sketch=lambda: network, differentiable=False)
    assert GenEvalScore(asked).sketch() is network
    assert GenEval2Score(asked).sketch() is network
    assert RewardScore(tiny.Brightness()).sketch() is None
    assert size_of_scores([GenEvalScore(asked), RewardScore(tiny.Brightness())]) == 4 * 8


def test_savings_leave_the_evaluation_and_do_not_sketch_it_again(fast_fit, tmp_path, monkeypatch):
    arguments, evaluation = [*fast_fit, *evaluating(tmp_path, [of_clip("a")])], 10**11
    now = Plan((Component("much", (), 0, 10**12),), {"evaluation": evaluation})
    monkeypatch.setattr(report, "size_of_scores", None)
    monkeypatch.setattr(report, "SWITCHES", (("--model.lora.rank=2",),))
    found = list(report.savings(arguments, parse(arguments, "plan"), now, 10**12))
    assert [saving.arguments[0] for saving in found[:2]] == ["--model.micro_batch_size=4", "--model.lora.rank=2"]
    assert all(saving.total > evaluation for saving in found)
