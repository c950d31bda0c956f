"""``fit`` with FSDP2 from shipped configurations, and the commands that read its checkpoints."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from test_deepspeed_commands import SMALL

from gdmd_lightning.cli import main
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.methods.checkpointing import read_checkpoint


@pytest.fixture
def runs(tmp_path) -> Path:
    """A directory with a tiny SD3 pipeline, prompts and ``small.yaml``."""
    lines = ["a red circle", "two blue squares", "a green triangle", "a red square", "a blue circle"]
    (tmp_path / "prompts.txt").write_text("\n".join(lines) + "\n")
    mine = json.loads(json.dumps(SMALL))
    del mine["trainer"]["strategy"]
    mine["model"]["init_args"]["family"] = {"init_args": {"path": str(tiny.save_pipeline(tmp_path / "pipeline"))}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(mine))
    return tmp_path


def fit(run_cli, place: Path, name: str, *arguments: str) -> Path:
    """Train SD3 under FSDP2 from the shipped configurations; returns the last checkpoint."""
    configs = [part for config in ("sd3.yaml", "fsdp2.yaml", "small.yaml") for part in ("--config", config)]
    where = ["--trainer.logger.init_args.version", name]
    run_cli("fit", *configs, *where, *arguments, cwd=place, check=True)
    return place / "runs" / "sd3" / name / "checkpoints" / "last.ckpt"


@pytest.mark.slow
def test_sd3_under_fsdp2_trains_evaluates_resumes_and_exports(run_cli, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    whole = fit(run_cli, runs, "whole")
    half = fit(run_cli, runs, "half", "--trainer.max_steps=1")
    resumed = fit(run_cli, runs, "resumed", f"--ckpt_path={half}")
    assert whole.is_file()
    one, other = read_checkpoint(str(whole)), read_checkpoint(str(resumed))
    assert one["global_step"] == other["global_step"] == 2
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert not tiny.differing(one[part], other[part])
    assert {value.dtype for value in one["state_dict"].values()} == {torch.float32}
    assert not [name for name in one["state_dict"] if "teacher" in name]
    assert_readable_by_every_command(whole, capsys)


@pytest.mark.slow
def test_sd3_with_adapters_under_fsdp2_trains_evaluates_resumes_and_exports(run_cli, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    adapters = ["--model.lora.rank=2", "--model.lora.alpha=4"]
    whole = fit(run_cli, runs, "whole", *adapters)
    half = fit(run_cli, runs, "half", "--trainer.max_steps=1", *adapters)
    resumed = fit(run_cli, runs, "resumed", f"--ckpt_path={half}", *adapters)
    one, other = read_checkpoint(str(whole)), read_checkpoint(str(resumed))
    assert not tiny.differing(one["state_dict"], other["state_dict"])
    assert all(".lora_" in name and value.dtype == torch.float32 for name, value in one["state_dict"].items())
    assert_readable_by_every_command(whole, capsys)


def assert_readable_by_every_command(checkpoint: Path, capsys) -> None:
    Path("two.txt").write_text("a red circle\na blue circle\n")
    main(["export", str(checkpoint), "exported", "--trust", "tiny"])
    assert Path("exported/model_index.json").is_file()
    main(["sample", str(checkpoint), "two.txt", "pictures", "--trust", "tiny"])
    assert len(list(Path("pictures").rglob("*.png"))) == 2
    with pytest.raises(SystemExit):
        main(["consolidate", str(checkpoint), "plain.ckpt"])
    assert "is a plain checkpoint already" in capsys.readouterr().err
    table = ["--checkpoint", f"sharded={checkpoint}", "--trust", "tiny"]
    main(["evaluate", *table, "--count", "6", "--teacher_steps", "1", "--out", "scores"])
    (scores,) = Path("scores").rglob("scores.json")
    assert "sharded" in scores.read_text()


def test_fsdp2_overlay_turns_off_adapters():
    parsed = parse(["--config", "sd3.yaml", "--config", "fsdp2.yaml"])
    assert parsed.model.init_args.lora is None
    assert parsed.trainer.strategy.class_path.endswith("FSDP2Strategy")
