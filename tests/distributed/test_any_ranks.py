"""One configuration with ``global_batch_size`` on 1, 2 and 4 processes under DDP: the same run."""

import pytest
import torch
from cases import DATA, build
from test_deepspeed import LOSS, OTHERS, UPDATES, alone, assert_same_run, loss_limit, pipeline, run_cases
from together import train_together

__all__ = ["alone", "pipeline"]  # fixtures

FEW_WEIGHTS = 1e-4
"""A tenth of a step: Adam turns the rounding error of a gradient that is almost 0 into a part of a step."""
DDP = {"strategy": "ddp_find_unused_parameters_true", "data": {"global_batch_size": 16}}


@pytest.mark.slow
def test_every_method_is_the_same_run_on_two_ranks(pipeline):
    modules = {"DMD": {}, "GDMD": {}} | {method: {"family": "sd3"} for method in OTHERS}
    cases = {
        method.replace(" ", "_"): {"method": method, "module": module, **DDP} for method, module in modules.items()
    }
    found = run_cases(pipeline, **cases)
    for (method, module), each in zip(modules.items(), found.values(), strict=True):
        expected = train_together(lambda m=method, own=module: build(pipeline, m, **own), UPDATES, **DATA)
        assert_same_run(each, expected, loss_limit(method))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
def test_gdmd_is_the_same_run_on_one_and_four_ranks(ranks, pipeline, alone):
    (found,) = run_cases(pipeline, ranks=ranks, gdmd={"method": "GDMD", **DDP}).values()
    assert_same_run(found, alone("GDMD"), weight=FEW_WEIGHTS)


@pytest.mark.slow
def test_adapters_are_the_same_run_on_two_ranks(pipeline, alone):
    lora = {"lora": {"rank": 2, "alpha": 4}}
    (found,) = run_cases(pipeline, lora={"method": "GDMD", "module": lora, **DDP}).values()
    assert_same_run(found, alone("GDMD", **lora))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [DDP["strategy"], {"stage": 3}])
def test_a_run_goes_on_on_another_number_of_ranks(strategy, pipeline):
    path = pipeline.parent / "two.ckpt"
    first = {"method": "GDMD", **DDP, "strategy": strategy, "updates": 2, "save": str(path)}
    (saved,) = run_cases(pipeline, first=first).values()
    assert not [own["error"] for own in saved if "error" in own]
    shared = {"method": "GDMD", **DDP, "strategy": strategy, "updates": 4}
    whole, resumed = run_cases(pipeline, ranks=1, whole=shared, resumed={**shared, "resume": str(path)}).values()
    assert "error" not in resumed[0], resumed
    for here, there in zip(resumed[0]["logs"], whole[0]["logs"][2:], strict=True):
        assert abs(here["loss"] - there["loss"]) <= LOSS * max(1, abs(there["loss"]))
    for name, value in whole[0]["weights"].items():
        assert (resumed[0]["weights"][name] - value).abs().max() <= FEW_WEIGHTS, name
    assert any(not torch.equal(value, saved[0]["weights"][name]) for name, value in resumed[0]["weights"].items())
