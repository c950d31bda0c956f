"""Our methods under FSDP2Strategy: two gloo processes against one process with all their samples."""

from pathlib import Path

import pytest
import tiny
import torch
from cases import DATA, METHODS, build
from test_deepspeed import (
    FAMILIES,
    IN_SHARDS,
    LORA,
    OTHERS,
    UPDATES,
    alone,
    assert_same_run,
    assert_shards_of,
    loss_limit,
    pipeline,
    run_cases,
)
from together import train_together

from gdmd_lightning.methods.checkpointing import read_checkpoint

__all__ = ["alone", "pipeline"]  # fixtures


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_and_recomputed_activations_train_as_one_process(method, pipeline, alone):
    parts, recomputed = {"micro_batch_size": 3}, {"memory": {"gradient_checkpointing": True}}
    shared = {"method": method, "strategy": "fsdp2"}
    found = run_cases(
        pipeline, whole=shared, parts={**shared, "module": parts}, recomputed={**shared, "module": recomputed}
    )
    assert_same_run(found["whole"], alone(method))
    assert_same_run(found["parts"], alone(method, **parts))
    assert_same_run(found["recomputed"], alone(method))


@pytest.mark.slow
def test_adapters_on_a_base_in_shards_train_as_one_process(pipeline, alone):
    path, shared = pipeline.parent / "fsdp2_adapters.ckpt", {"method": "GDMD", "strategy": "fsdp2"}
    parts, recomputed = {"micro_batch_size": 3}, {"memory": {"gradient_checkpointing": True}}
    found = run_cases(
        pipeline,
        whole={**shared, "module": LORA, "save": str(path)},
        dmd={**shared, "method": "DMD", "module": LORA},
        parts={**shared, "module": LORA | parts},
        recomputed={**shared, "module": LORA | recomputed},
        first={**shared, "updates": 2, "module": LORA, "save": f"{path}2"},
        resumed={**shared, "module": LORA, "resume": f"{path}2"},
    )
    resumed = found.pop("resumed")
    found.pop("first")
    for name, own in found.items():
        expected = alone("DMD" if name == "dmd" else "GDMD", **LORA, **(parts if name == "parts" else {}))
        assert_same_run(own, expected)
    network = alone("GDMD", **LORA)[1].roles.network
    adapters = sum(p.numel() * 4 for name, p in network.named_parameters() if ".lora_" in name)
    base = sum(p.numel() * 4 for p in network.parameters()) - adapters
    for rank, own in enumerate(found["whole"]):
        assert own["bytes"]["network"] <= adapters + (1 / 2 + 0.05) * base
        assert not tiny.differing(own["weights"], resumed[rank]["weights"])
    saved = read_checkpoint(str(path))["state_dict"]
    assert saved
    for name, value in saved.items():
        assert ".lora_" in name
        assert torch.equal(found["whole"][0]["weights"][name.removeprefix("roles.")], value)


@pytest.mark.slow
def test_four_ranks_hold_a_quarter_of_every_role(pipeline, alone):
    (found,) = run_cases(pipeline, ranks=4, four={"method": "GDMD", "strategy": "fsdp2", "updates": 1}).values()
    assert not [own["error"] for own in found if "error" in own]
    assert_shards_of(found, alone("GDMD")[1])


@pytest.mark.slow
def test_other_families_train_as_one_process(pipeline):
    for family, save in FAMILIES.items():
        path = save(pipeline.parent / f"fsdp2_{family}")
        own = {"method": "gdmd", "module": {"family": family}, "pipeline": str(path), "strategy": "fsdp2"}
        (found,) = run_cases(pipeline, **{family: own}).values()
        expected = train_together(lambda own=own: build(own["pipeline"], "gdmd", **own["module"]), UPDATES, **DATA)
        assert_same_run(found, expected)


@pytest.mark.slow
def test_other_methods_train_as_one_process(pipeline):
    own = {"module": {"family": "sd3"}, "strategy": "fsdp2"}
    found = run_cases(pipeline, **{method.replace(" ", "_"): {**own, "method": method} for method in OTHERS})
    for method, each in zip(OTHERS, found.values(), strict=True):
        expected = train_together(lambda method=method: build(pipeline, method, family="sd3"), UPDATES, **DATA)
        assert_same_run(each, expected, loss_limit(method))


@pytest.mark.slow
def test_runs_resume_to_the_bit_on_as_many_ranks(pipeline):
    path, shared = pipeline.parent / "fsdp2.ckpt", {"method": "GDMD", "strategy": "fsdp2", "updates": 4}
    found = run_cases(
        pipeline,
        whole=shared,
        first={**shared, "updates": 2, "save": str(path)},
        resumed={**shared, "resume": str(path)},
        started={**shared, "updates": 1, "module": {"start_from": str(path)}},
    )
    assert not [own[0]["error"] for own in found.values() if "error" in own[0]]
    for one, other in zip(found["whole"], found["resumed"]):
        assert one["logs"][2:] == other["logs"]
        assert not tiny.differing(one["weights"], other["weights"])
    content = read_checkpoint(str(path))
    assert content["state_dict"]
    assert not [name for name in content["state_dict"] if "teacher" in name]
    for name, value in content["state_dict"].items():
        assert type(value) is torch.Tensor
        assert torch.equal(found["first"][0]["weights"][name.removeprefix("roles.")], value)
    # One rank with other samples in an update is another run; with as many it goes on, under another strategy too.
    other = {**shared, "resume": str(path)}
    same = {**other, "data": {"batch_size": 2 * DATA["batch_size"]}}
    alone = run_cases(pipeline, ranks=1, refused=other, ddp={**same, "strategy": "auto"}, same=same)
    assert "16 samples of an update on all ranks (now 8); set data.global_batch_size 16" in alone["refused"][0]["error"]
    for name in ("same", "ddp"):
        assert "error" not in alone[name][0], alone[name]
        for key, value in found["whole"][0]["weights"].items():
            # A tenth of a step: Adam turns the rounding error of a gradient that is almost 0 into a part of a step.
            assert (alone[name][0]["weights"][key] - value).abs().max() <= 1e-4, key


@pytest.mark.slow
def test_runs_go_on_between_deepspeed_and_fsdp2(pipeline):
    pytest.importorskip("deepspeed")
    zero3 = {"method": "GDMD", "strategy": {"stage": 3, **IN_SHARDS}, "updates": 4}
    fsdp2 = {"method": "GDMD", "strategy": "fsdp2", "updates": 4}
    directory, file = str(pipeline.parent / "zero3.ckpt"), str(pipeline.parent / "other_fsdp2.ckpt")
    found = run_cases(
        pipeline,
        whole=fsdp2,
        zero3={**zero3, "updates": 2, "save": directory},
        fsdp2={**fsdp2, "updates": 2, "save": file},
        to_fsdp2={**fsdp2, "resume": directory},
        to_zero3={**zero3, "resume": file},
    )
    assert Path(directory).is_dir()
    for name in ("to_fsdp2", "to_zero3"):
        for rank, own in enumerate(found[name]):
            assert "error" not in own, own
            assert own["updates"] == 4
            for key, value in found["whole"][rank]["weights"].items():
                # As above: a tenth of a step.
                assert (own["weights"][key] - value).abs().max() <= 1e-4, (name, key)


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_stops_or_is_skipped_on_all(pipeline):
    shared = {"method": "NaNOnOneRank", "strategy": "fsdp2"}
    skip = {"non_finite": {"policy": "skip", "limit": 1}}
    found = run_cases(pipeline, stopped=shared, skipped={**shared, "module": skip})
    for own in found["stopped"]:
        assert "UserError: role 'generator': loss" in own["error"]
    for own in found["skipped"]:
        assert [logs["skipped_steps"] for logs in own["logs"]] == [0, 1, 0]
        assert all(torch.isfinite(value).all() for value in own["weights"].values())
    assert not tiny.differing(found["skipped"][0]["weights"], found["skipped"][1]["weights"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.generator.algorithm=adamw_8bit"], "the moments of adamw_8bit cannot be split"),
        (["--trainer.precision=16-mixed"], "16-mixed"),
        (["--trainer.strategy.class_path=ModelParallelStrategy"], "use FSDP2Strategy"),
    ],
)
def test_settings_that_cannot_work_are_one_line_before_training(complaint, fast_fit, arguments, message):
    assert message in complaint("fit", *fast_fit, "--config", "fsdp2.yaml", "--trainer.devices=1", *arguments)
