"""MultiEngineDeepSpeedStrategy on a GAN-like toy: two gloo processes against a single one without DeepSpeed."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from processes import run_ranks
from safetensors.torch import save_file
from toy_gan import ToyGAN, network
from toy_runs import Batches, Observe, Seeded, large

from gdmd_lightning.strategies import consolidated

HERE = Path(__file__).parent
LOSS, WEIGHT = 1e-6, 2e-5
STEPS = 4
OFFLOADED = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
HERE_AND_AWAY = {"": {}, " offloaded": OFFLOADED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("toy")
    torch.manual_seed(9)
    save_file(network().state_dict(), place / "teacher.safetensors")
    return place


@pytest.fixture(scope="module")
def plain(folder):
    """Losses and weights of one process without DeepSpeed on whole batches."""
    trainer = alone(folder, 0, STEPS)
    return trainer.callbacks[0].losses, trainer.lightning_module.state_dict()


def alone(folder, start: int, steps: int, resume: Path | None = None) -> pl.Trainer:
    """A trainer that has trained the toy without DeepSpeed on the whole batches of these steps."""
    torch.manual_seed(3)
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=2 * steps, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Observe()],
    )  # fmt: skip
    module = Seeded(str(folder / "teacher.safetensors"))
    trainer.fit(module, torch.utils.data.DataLoader(Batches(start, steps, None), batch_size=None), ckpt_path=resume)
    return trainer


def run_cases(folder: Path, ranks: int = 2, **cases: dict) -> list[dict]:
    """What rank 0 found in each case, all run by the same processes."""
    (folder / "cases.json").write_text(json.dumps(cases))
    run_ranks(HERE / "toy_runs.py", folder / "cases.json", ranks=ranks)
    return [torch.load(folder / f"{name}-0.pt") for name in cases]


def assert_same_run(found: dict, plain) -> None:
    losses, weights = plain
    assert "error" not in found, found
    assert len(found["losses"]) == len(losses) == STEPS
    for here, there in zip(found["losses"], losses):
        assert here.keys() == there.keys() == {"generator", "critic"}
        assert all(abs(here[name] - there[name]) <= LOSS for name in here)
    assert {name for name in found["weights"] if not name.startswith("teacher.")} == weights.keys()
    for name, value in weights.items():
        assert (found["weights"][name] - value).abs().max() <= WEIGHT, name


def test_checkpoint_without_the_teacher_resumes_without_deepspeed(folder, plain):
    alone(folder, 0, STEPS // 2).save_checkpoint(folder / "alone.ckpt")
    resumed = alone(folder, STEPS // 2, STEPS, folder / "alone.ckpt")
    assert resumed.callbacks[0].losses == plain[0][STEPS // 2 :]
    for name, value in resumed.lightning_module.state_dict().items():
        assert torch.equal(value, plain[1][name]), name


def test_different_stages_train_as_one_process_and_resume_to_the_bit(folder, plain):
    # Small weights would stay gathered otherwise.
    in_shards = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    mixed = {"stages": {"generator": 3, "critic": 1}, "configs": {"generator": in_shards}}
    half, end, after = (str(folder / f"{name}.ckpt") for name in ("half", "end", "after"))
    shard = f"{half}/critic/00001.safetensors"
    whole, _, resumed, damaged, offloaded = run_cases(
        folder,
        whole={"strategy": mixed, "steps": STEPS, "save": end, "after": after},
        first={"strategy": mixed, "steps": STEPS // 2, "save": half},
        resumed={"strategy": mixed, "start": STEPS // 2, "steps": STEPS, "resume": half},
        damaged={"strategy": mixed, "steps": STEPS, "resume": half, "flipped": shard},
        offloaded={"strategy": {"stage": 1, "stages": {"generator": 2}, "config": OFFLOADED}, "steps": STEPS},
    )
    assert_same_run(whole, plain)
    assert_same_run(offloaded, plain)
    assert resumed["steps"] == whole["steps"] == 2 * STEPS
    assert resumed["losses"] == whole["losses"][STEPS // 2 :]
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name
    for found in (damaged, torch.load(folder / "damaged-1.pt")):
        assert f"cannot be loaded: rank 1: '{shard}' is damaged: its checksum does not match" in found["error"]
    size = sum(parameter.numel() * 4 for parameter in network().parameters())
    assert whole["teacher_bytes"] <= size * (1 / 2 + 0.05)
    assert whole["hooks"] == 0  # ours, after the training
    names = {path.name for path in Path(half).iterdir()}
    assert names == {"generator", "critic", "manifest.json", "rest.ckpt"}
    assert not any(name.startswith("teacher") for name in consolidated(half)["state_dict"])
    # Lightning's usual calls after a training.
    one, other = consolidated(end), consolidated(after)
    for part in ("state_dict", "optimizer_states", "global_step"):
        torch.testing.assert_close(one[part], other[part], rtol=0, atol=0)
    assert len(set(whole["tested"])) == 1
    assert all(torch.equal(each, whole["predicted"][0]) for each in whole["predicted"])
    assert whole["refused"].endswith("no moments to save with them: use save_checkpoint(..., weights_only=True)")
    torch.testing.assert_close(consolidated(folder / "weights.ckpt")["state_dict"], one["state_dict"], rtol=0, atol=0)


@pytest.mark.slow
def test_every_stage_trains_as_one_process(folder, plain):
    strategies = {"one": {"stage": 1}, "two": {"stage": 2}, "three": {"stage": 3}}
    for found in run_cases(folder, **{name: {"strategy": s, "steps": STEPS} for name, s in strategies.items()}):
        assert_same_run(found, plain)


@pytest.mark.slow
def test_every_stage_resumes_to_the_bit_and_in_another_stage(folder):
    def halves(stage: int) -> dict[str, dict]:
        path, strategy = str(folder / f"stage{stage}.ckpt"), {"stage": stage}
        return {
            f"whole{stage}": {"strategy": strategy, "steps": STEPS},
            f"first{stage}": {"strategy": strategy, "steps": 2, "save": path},
            f"resumed{stage}": {"strategy": strategy, "start": 2, "steps": STEPS, "resume": path},
        }

    cases = halves(1) | halves(2) | halves(3)
    cases["across"] = {**cases["resumed1"], "resume": str(folder / "stage3.ckpt")}
    cases["other"] = {**cases["across"], "kind": "narrow"}
    found = dict(zip(cases, run_cases(folder, **cases)))
    for stage in (1, 2, 3):
        for name, value in found[f"whole{stage}"]["weights"].items():
            assert torch.equal(found[f"resumed{stage}"]["weights"][name], value), (stage, name)
    for name, value in found["whole1"]["weights"].items():
        assert (found["across"]["weights"][name] - value).abs().max() <= WEIGHT, name
    assert "rank 0: critic.0.0.bias is (32,) there, (16,) here" in found["other"]["error"]


@pytest.mark.slow
def test_clipping_is_per_role_and_skips_what_is_not_finite(folder):
    # AdamW does not see the size of gradients, so the norms and the first steps of a changed one tell.
    clipped = {"stage": 2, "configs": {"critic": {"gradient_clipping": 1e-12}}}
    free, small, broken = run_cases(
        folder,
        free={"strategy": {"stage": 2}, "steps": 1},
        small={"strategy": clipped, "steps": 1},
        broken={"strategy": {"stage": 3}, "steps": 2, "module": {"learning_rate": 1e30}},
    )
    # The critic steps first, so only its gradient is the same in both runs.
    assert small["norms"]["critic"] == free["norms"]["critic"] > 0.01
    torch.manual_seed(3)
    start = ToyGAN("")
    start.generator, start.critic = network(), torch.nn.Sequential(network(), torch.nn.Linear(8, 1))

    def moved(found: dict, role: str) -> float:
        pairs = start.get_submodule(role).state_dict().items()
        return max(float((found["weights"][f"{role}.{name}"] - value).abs().max()) for name, value in pairs)

    assert moved(free, "critic") == pytest.approx(1e-2, rel=0.05)
    assert moved(small, "critic") < 1e-3
    assert moved(small, "generator") == pytest.approx(1e-2, rel=0.05)
    assert broken["norms"]["critic"] == float("inf")


@pytest.mark.slow
def test_engines_have_their_own_precision_and_offload(folder, plain):
    offloaded, half = run_cases(
        folder,
        offloaded={"strategy": {"stage": 3, "configs": {"generator": OFFLOADED}}, "steps": STEPS},
        half={
            "strategy": {"stage": 2},
            "trainer": {"precision": "bf16-mixed"},
            "steps": STEPS,
            "save": str(folder / "half_precision.ckpt"),
        },
    )
    assert_same_run(offloaded, plain)
    for here, there in zip(half["losses"], plain[0]):
        assert all(0 < abs(here[name] - there[name]) < 0.02 for name in here)
    weights = consolidated(folder / "half_precision.ckpt")["state_dict"]
    assert {value.dtype for value in weights.values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_changes_neither_clipping_nor_layers_that_get_a_gradient_only_sometimes(stage, folder):
    clipped = {"stage": stage, "configs": {"critic": {"gradient_clipping": 1e-8}}}
    shared = {"steps": STEPS, "kind": "leaving"}
    here, away, broken = run_cases(
        folder,
        here={**shared, "strategy": clipped},
        away={**shared, "strategy": {**clipped, "config": OFFLOADED}},
        broken={"strategy": {"stage": stage, "config": OFFLOADED}, "steps": 2, "module": {"learning_rate": 1e30}},
    )
    assert away["norms"] == pytest.approx(here["norms"], rel=1e-5)
    for name, value in here["weights"].items():
        assert (away["weights"][name] - value).abs().max() <= LOSS, name
    assert broken["norms"]["critic"] == float("inf")


def test_gradients_that_are_cleared_before_a_step_are_forgotten(folder, plain):
    cases = {f"{stage}{where}": (stage, config) for stage in (1, 2, 3) for where, config in HERE_AND_AWAY.items()}
    shared = {"kind": "dropping", "steps": STEPS}
    strategies = [{"stage": stage, "config": config} for stage, config in cases.values()]
    for found in run_cases(folder, 1, **{name: {**shared, "strategy": s} for name, s in zip(cases, strategies)}):
        assert_same_run(found, plain)


@pytest.mark.slow
def test_a_frozen_network_is_never_whole_on_a_rank(folder):
    whole = large()
    save_file(whole.state_dict(), folder / "large.safetensors")
    size = sum(parameter.numel() * 4 for parameter in whole.parameters())
    run_cases(folder, large={"strategy": {"stage": 2}, "steps": 1, "kind": "large"})
    for rank in (0, 1):
        found = torch.load(folder / f"large-{rank}.pt")
        assert found["large_bytes"] == size / 2
        assert 0.45 * size < found["peak"] <= (1 / 2 + 0.05) * size, found["peak"] / size
        assert found["half_bytes"] == 2 * (512 * 512 + 512) / 2
        assert torch.equal(found["half"]["weight"], torch.full((512, 512), 1 / 3, dtype=torch.bfloat16))


@pytest.mark.slow
def test_a_rank_killed_while_writing_leaves_the_previous_checkpoint(folder):
    path = folder / "kept.ckpt"
    (first,) = run_cases(folder, first={"strategy": {"stage": 3}, "steps": 2, "save": str(path)})
    again = {"strategy": {"stage": 3}, "start": 2, "steps": STEPS, "resume": str(path), "save": str(path)}
    (folder / "cases.json").write_text(json.dumps({"killed": {**again, "killed_while_writing": True}}))
    codes, _ = run_ranks(HERE / "toy_runs.py", folder / "cases.json", check=False)
    assert codes[1] == -9
    assert list(folder.glob("kept.ckpt.*.part")), "nothing was being written"
    kept = consolidated(path)
    assert kept["global_step"] == 4
    for name, value in kept["state_dict"].items():
        assert torch.equal(first["weights"][name], value)
    run_cases(folder, later=again)
    assert consolidated(path)["global_step"] == 2 * STEPS
    assert not list(folder.glob("*.part"))


@pytest.mark.slow
def test_another_number_of_ranks_resumes_from_shards_and_from_a_plain_checkpoint(folder):
    path = folder / "two.ckpt"
    run_cases(folder, two={"strategy": {"stage": 3}, "steps": 2, "save": str(path)})
    torch.save(consolidated(path), folder / "plain.ckpt")
    again = {"strategy": {"stage": 2}, "start": 2, "steps": STEPS}
    resumed = run_cases(
        folder,
        ranks=1,
        shards={**again, "resume": str(path)},
        plain={**again, "resume": str(folder / "plain.ckpt")},
    )
    (whole,) = run_cases(folder, whole={"strategy": {"stage": 3}, "steps": STEPS})
    for each in resumed:
        assert each["steps"] == 2 * STEPS
        for name, value in whole["weights"].items():
            assert (each["weights"][name] - value).abs().max() <= WEIGHT, name
