"""Our methods under MultiEngineDeepSpeedStrategy: two gloo processes against one process with all their samples.

The fast test is in ``test_two_processes.py``, so that all fast runs of two processes are forks of one.
"""

import json
from pathlib import Path

import pytest
import tiny
import torch
from cases import DATA, METHODS, build
from processes import run_ranks
from together import train_together

from gdmd_lightning.methods.checkpointing import content_digest, read_checkpoint

HERE = Path(__file__).parent
LOSS, WEIGHT = 1e-6, 2e-5
# Tiny weights would stay gathered otherwise, and nothing would be in shards.
IN_SHARDS = {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}
UPDATES = 3
LORA = {"lora": {"rank": 2, "alpha": 4}}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    return tiny.save_pipeline(tmp_path_factory.mktemp("deepspeed") / "pipeline", layers=2)


@pytest.fixture(scope="module")
def alone(pipeline):
    """What one process finds that plays both ranks, by method; computed once."""
    found: dict = {}

    def train(method: str, **options):
        key = (method, json.dumps(options))
        if key not in found:
            found[key] = train_together(lambda: build(pipeline, method, **options), UPDATES, **DATA)
        return found[key]

    return train


def run_cases(pipeline: Path, ranks: int = 2, check: bool = True, **cases: dict) -> dict[str, list[dict]]:
    """What each rank found in each case; all are run by the same processes."""
    folder = pipeline.parent
    shared = {"pipeline": str(pipeline), "updates": UPDATES}
    (folder / "cases.json").write_text(json.dumps({name: shared | case for name, case in cases.items()}))
    run_ranks(HERE / "method_runs.py", folder / "cases.json", ranks=ranks, check=check)
    return {name: [torch.load(folder / f"{name}-{rank}.pt") for rank in range(ranks)] for name in cases}


def assert_same_run(found: list[dict], expected, loss: float = LOSS, weight: float = WEIGHT) -> None:
    logs, module = expected
    for rank, own in enumerate(found):
        assert "error" not in own, own
        assert own["updates"] == len(own["logs"]) == len(logs) == UPDATES
        for here, there in zip(own["logs"], logs):
            for name in there:
                # Correlations and the like amplify the last digits.
                limit = loss if "loss" in name else 1e-4
                assert abs(here[name] - there[name]) <= limit * max(1, abs(there[name])), (rank, name)
        assert own["teacher"] == module.teacher_digest
        weights = module.roles.state_dict()
        assert own["weights"].keys() == weights.keys()
        for name, value in weights.items():
            assert (own["weights"][name] - value).abs().max() <= weight, (rank, name)


def loss_limit(method: str) -> float:
    """Losses of policy gradients are ratios of probabilities, which amplify the last digits."""
    return 2e-5 if method in ("flow_grpo", "rtdmd") else LOSS


def assert_shards_of(found: list[dict], module) -> None:
    whole = sum(p.numel() * 4 for p in module.roles.get_submodule("teacher").parameters())
    for own in found:
        assert own["bytes"].keys() == {"teacher", "generator", "ema", "fake_score", "old", "fake_score@1"}
        assert all(size <= (1 / len(found) + 0.05) * whole for size in own["bytes"].values()), own["bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_stage_trains_as_one_process(method, pipeline, alone):
    parts = {"micro_batch_size": 3}
    cases = {f"zero{stage}": {"method": method, "strategy": {"stage": stage, **IN_SHARDS}} for stage in (1, 2, 3)}
    cases |= {f"{name}_in_parts": {**case, "module": parts} for name, case in cases.items()}
    recomputed = {"memory": {"gradient_checkpointing": True}}
    cases |= {"zero3_recomputed": {**cases["zero3"], "module": recomputed}}
    mixed = {"stages": {"generator": 3, "fake_score": 1}, **IN_SHARDS}
    cases |= {"mixed": {"method": method, "strategy": mixed}}
    cases |= {"ddp": {"method": method, "strategy": "ddp_find_unused_parameters_true"}}
    for name, found in run_cases(pipeline, **cases).items():
        assert_same_run(found, alone(method, **(parts if name.endswith("in_parts") else {})))


@pytest.mark.slow
def test_adapters_train_as_one_process_in_stages_1_and_2_and_are_refused_in_3(pipeline, alone):
    cases = {f"zero{stage}": {"method": "DMD", "strategy": {"stage": stage}, "module": LORA} for stage in (1, 2, 3)}
    path = pipeline.parent / "adapters.ckpt"
    cases["zero2"]["save"] = str(path)
    found = run_cases(pipeline, **cases)
    refusal = found.pop("zero3")[0]["error"]
    assert "UserError: trainer.strategy: ZeRO 3 cannot shard the adapter of 'generator'" in refusal
    for own in found.values():
        assert_same_run(own, alone("DMD", **LORA))
    saved = read_checkpoint(str(path))["state_dict"]
    assert saved
    for name, value in saved.items():
        assert torch.equal(found["zero2"][0]["weights"][name.removeprefix("roles.")], value)


@pytest.mark.slow
def test_switches_for_speed_train_as_one_process_without_them(pipeline, alone):
    strategies = {"zero2": {"stage": 2}, "zero3": {"stage": 3, **IN_SHARDS}, "fsdp2": "fsdp2"}
    strategies["ddp"] = "ddp_find_unused_parameters_true"
    overlap, last = (
        {"method": "GDMD", "module": {"speed": {name: True}}} for name in ("overlap_reward", "channels_last")
    )
    cases = {name: {**overlap, "strategy": strategy} for name, strategy in strategies.items()}
    cases["ddp_channels_last"] = {**last, "strategy": strategies["ddp"]}
    found = run_cases(pipeline, **cases)
    # Convolutions round otherwise in this layout, which AdamW amplifies where gradients are small; its steps are 1e-3.
    assert_same_run(found.pop("ddp_channels_last"), alone("GDMD"), loss=1e-5, weight=1e-4)
    for own in found.values():
        assert_same_run(own, alone("GDMD"))


FAMILIES = {"sdxl": tiny.save_sdxl, "flux2": tiny.save_flux2}


@pytest.mark.slow
def test_other_families_train_in_shards_as_one_process(pipeline):
    cases, modules = {}, {}
    for family, save in FAMILIES.items():
        path = save(pipeline.parent / family)
        own = {"method": "gdmd", "module": {"family": family}, "pipeline": str(path)}
        cases[family] = {**own, "strategy": {"stage": 3, **IN_SHARDS}}
        modules[family] = train_together(
            lambda own=own: build(own["pipeline"], "gdmd", **own["module"]), UPDATES, **DATA
        )
    for family, found in run_cases(pipeline, **cases).items():
        assert_same_run(found, modules[family])


OTHERS = ("dmd2", "refl", "decoupled dmd", "gndm", "gndmr", "ac_dmd", "dmdr", "flow_grpo", "nft", "rtdmd")


@pytest.mark.slow
def test_other_methods_train_in_shards_as_one_process(pipeline):
    own = {"module": {"family": "sd3"}, "strategy": {"stage": 3, **IN_SHARDS}}
    found = run_cases(pipeline, **{method.replace(" ", "_"): {**own, "method": method} for method in OTHERS})
    for method, each in zip(OTHERS, found.values(), strict=True):
        expected = train_together(lambda method=method: build(pipeline, method, family="sd3"), UPDATES, **DATA)
        assert_same_run(each, expected, loss_limit(method))


@pytest.mark.slow
def test_runs_resume_to_the_bit_or_in_another_stage_and_start_from_others(pipeline):
    folder = pipeline.parent
    strategies = {"zero1": {"stage": 1}, "zero3": {"stage": 3, **IN_SHARDS}}
    cases: dict[str, dict] = {}
    for name, strategy in strategies.items():
        shared, path = {"method": "GDMD", "strategy": strategy, "updates": 4}, str(folder / f"{name}.ckpt")
        cases[f"{name}_whole"] = shared
        cases[f"{name}_first"] = {**shared, "updates": 2, "save": path}
        cases[f"{name}_resumed"] = {**shared, "resume": path}
    # Averages, snapshots and the old policy are whole in one stage and in shards in the other.
    mixed = {"stage": 3, "stages": {"generator": 1}, **IN_SHARDS}
    across = {"one_in_three": ("zero1", strategies["zero3"]), "three_in_one": ("zero3", strategies["zero1"])}
    across["three_in_mixed"] = ("zero3", mixed)
    for name, (origin, strategy) in across.items():
        cases[name] = {**cases[f"{origin}_resumed"], "strategy": strategy}
    started = {"start_from": str(folder / "zero3.ckpt")}
    cases["started"] = {"method": "GDMD", "strategy": {"stage": 3, **IN_SHARDS}, "updates": 1, "module": started}
    cases["started_whole"] = {**cases["started"], "strategy": "ddp_find_unused_parameters_true"}
    found = run_cases(pipeline, **cases)
    assert not [own[0]["error"] for own in found.values() if "error" in own[0]]
    for name in strategies:
        whole, resumed = found[f"{name}_whole"], found[f"{name}_resumed"]
        for one, other in zip(whole, resumed):
            assert one["logs"][2:] == other["logs"]
            assert not tiny.differing(one["weights"], other["weights"])
    pairs = [("started", "started_whole"), ("one_in_three", "zero3_whole")]
    pairs += [(name, "zero1_whole") for name in ("three_in_one", "three_in_mixed")]
    for one, other in (each for here, there in pairs for each in zip(found[here], found[there], strict=True)):
        assert one["updates"] == other["updates"]
        for name, value in other["weights"].items():
            assert (one["weights"][name] - value).abs().max() <= WEIGHT, name
    names = {path.name for path in (folder / "zero3.ckpt").iterdir()}
    assert names == {"generator", "fake_score", "ema", "old", "fake_score@1", "manifest.json", "rest.ckpt"}
    content = read_checkpoint(str(folder / "zero3.ckpt"))
    assert not [name for name in content["state_dict"] if "teacher" in name]
    for name, value in content["state_dict"].items():
        assert torch.equal(found["zero3_first"][0]["weights"][name.removeprefix("roles.")], value)
    assert content_digest(str(folder / "zero3.ckpt")) != content_digest(str(folder / "zero1.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_step_that_is_not_finite_on_one_rank_stops_or_is_skipped_on_all(stage, pipeline):
    shared = {"method": "NaNOnOneRank", "strategy": {"stage": stage, **IN_SHARDS}}
    skip = {"non_finite": {"policy": "skip", "limit": 1}}
    found = run_cases(pipeline, stopped=shared, skipped={**shared, "module": skip})
    for own in found["stopped"]:
        assert "UserError: role 'generator': loss" in own["error"]
        assert "gradient norm inf in update 2" in own["error"]
    for own in found["skipped"]:
        assert [logs["skipped_steps"] for logs in own["logs"]] == [0, 1, 0]
        assert all(torch.isfinite(value).all() for value in own["weights"].values())
    assert not tiny.differing(found["skipped"][0]["weights"], found["skipped"][1]["weights"])


@pytest.fixture(scope="module")
def adapters_alone(pipeline):
    """What one process finds that trains adapters with each of the other methods."""
    modules = {method: lambda method=method: build(pipeline, method, family="sd3", lora=True) for method in OTHERS}
    return {method: train_together(module, UPDATES, **DATA) for method, module in modules.items()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [{"stage": 1}, {"stage": 2}, "fsdp2", "ddp_find_unused_parameters_true"], ids=str)
def test_other_methods_train_adapters_as_one_process(strategy, pipeline, adapters_alone):
    own = {"module": {"family": "sd3", "lora": True}, "strategy": strategy}
    found = run_cases(pipeline, **{method.replace(" ", "_"): {**own, "method": method} for method in OTHERS})
    for method, each in zip(OTHERS, found.values(), strict=True):
        assert_same_run(each, adapters_alone[method], loss_limit(method))
