"""What a plan says two processes hold under DeepSpeed and FSDP2 is what they hold, within a tenth."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
from processes import run_ranks

from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.planning.footprint import plan
from gdmd_lightning.planning.strategy import read_strategy

HERE = Path(__file__).parent
CONFIG = {"zero_optimization": {"stage3_param_persistence_threshold": 0, "reduce_bucket_size": 100_000}}


@pytest.mark.slow
def test_plan_of_shares_equals_what_two_processes_hold_within_ten_percent(tmp_path):
    pytest.importorskip("deepspeed")
    pipeline = tiny.save_pipeline(tmp_path / "pipeline", layers=2)
    strategies = {f"zero{stage}": {"stage": stage, "config": CONFIG} for stage in (1, 2, 3)} | {"fsdp2": "fsdp2"}
    shared = {"pipeline": str(pipeline), "method": "DMD"}
    (tmp_path / "cases.json").write_text(
        json.dumps({name: {**shared, "strategy": strategy} for name, strategy in strategies.items()})
    )
    run_ranks(HERE / "plan_runs.py", tmp_path / "cases.json")
    for name, settings in strategies.items():
        kind, settings = ("FSDP2Strategy", {}) if name == "fsdp2" else ("MultiEngineDeepSpeedStrategy", settings)
        given = SimpleNamespace(class_path=kind, init_args=settings)
        module = tiny.module(pipeline, DMD)
        strategy = read_strategy(SimpleNamespace(strategy=given, devices=2, num_nodes=1), module)
        planned = plan(module, 8, strategy=strategy)
        sizes = {component.name.removesuffix(" (1/2)"): component.size for component in planned.components}
        for rank in (0, 1):
            held = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            for role, size in held["networks"].items():
                assert sizes[role] == pytest.approx(size, rel=0.1), (name, role)
            for role in ("generator", "fake_score"):
                own = held[role]
                assert sizes[role] == pytest.approx(own["weights"], rel=0.1), (name, role)
                assert sizes[f"{role}: optimizer states"] == pytest.approx(own["moments"], rel=0.1), (name, role)
                assert sizes.get(f"{role}: stepped weights", 0) == pytest.approx(own["stepped"], rel=0.1), (name, role)
                whole = sizes["generator"] if name == "zero1" else 0  # alive from the backward pass to the step only
                assert sizes.get(f"{role}: gradients", whole) == pytest.approx(own["gradients"], rel=0.1), (name, role)
