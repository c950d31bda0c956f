"""Our methods under FSDP2Strategy: two gloo processes against one process with all their samples."""

from test_deepspeed import alone, assert_same_run, pipeline, run_cases  # noqa: F401  (fixtures)


def test_gdmd_under_fsdp2_trains_as_one_process(pipeline, alone):  # noqa: F811
    (found,) = run_cases(pipeline, fsdp2={"method": "GDMD", "strategy": "fsdp2"}).values()
    assert_same_run(found, alone("GDMD"))
    whole = sum(p.numel() * 4 for p in alone("GDMD")[1].roles.get_submodule("teacher").parameters())
    for own in found:
        assert own["bytes"].keys() == {"teacher", "generator", "ema", "fake_score", "old", "fake_score@1"}
        assert all(size <= (1 / 2 + 0.05) * whole for size in own["bytes"].values()), own["bytes"]
