"""``fit`` with DeepSpeed from shipped configurations, and the commands that read its checkpoints."""

import json
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from PIL import Image

from gdmd_lightning.cli import main
from gdmd_lightning.locations import shipped_configs
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.strategies.shards import is_sharded

SMALL = {
    "trainer": {
        "accelerator": "cpu",
        "devices": 2,
        "max_steps": 2,
        "enable_progress_bar": False,
        "strategy": {"init_args": {"config": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}},
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"every_n_train_steps": 1, "save_last": True,
                                                            "save_top_k": 0}},
            {"class_path": "GradientRewardRecord", "init_args": {"pictures_every": 2}},
            # Ranks have different numbers of pictures, and only one of them draws.
            {"class_path": "GenerationEvaluation", "init_args": {
                "scores": [{"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}],
                "prompts": "prompts.txt", "count": 5, "columns": 2, "teacher_steps": 2, "batch_size": 2,
                "every_n_updates": 2}},
            {"class_path": "GenerationVariety", "init_args": {"prompts": "prompts.txt", "count": 3, "samples": 2,
                                                              "every_n_updates": 2}},
        ],
    },
    "data": {"batch_size": 4, "group_size": 2},
    "model": {
        "init_args": {
            "height": 32,
            "width": 32,
            "reward": {"class_path": "tiny.Brightness"},
            "targets": {"size": 2},
            "matching": {"fake_score_updates": 2},
        }
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A directory with a tiny SD3 pipeline, prompts and ``small.yaml``."""
    place = tmp_path_factory.mktemp("runs")
    (place / "prompts.txt").write_text(
        "a red circle\ntwo blue squares\na green triangle\na red square\na blue circle\n"
    )
    mine = json.loads(json.dumps(SMALL))
    mine["model"]["init_args"]["family"] = {"init_args": {"path": str(tiny.save_pipeline(place / "pipeline"))}}
    (place / "small.yaml").write_text(yaml.safe_dump(mine))
    return place


def fit(run_cli, place: Path, name: str, *arguments: str) -> Path:
    """Train SD3 in shards from the shipped configurations; returns the last checkpoint."""
    configs = [part for config in ("sd3.yaml", "zero3.yaml", "small.yaml") for part in ("--config", config)]
    where = ["--trainer.logger.init_args.version", name]
    run_cli("fit", *configs, *where, *arguments, cwd=place, check=True)
    return place / "runs" / "sd3" / name / "checkpoints" / "last.ckpt"


@pytest.mark.slow
def test_sd3_in_shards_trains_resumes_consolidates_and_exports(run_cli, runs, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    whole = fit(run_cli, runs, "whole")
    half = fit(run_cli, runs, "half", "--trainer.max_steps=1")
    assert is_sharded(whole)
    assert {file.name for file in whole.parent.iterdir()} == {"last.ckpt"}
    assert (runs / "runs" / "sd3" / "whole" / "pictures" / "000002.png").is_file()
    kept = runs / "runs" / "sd3" / "whole" / "evaluations" / "prompts" / "000002"
    assert len((kept / "pictures.jsonl").read_text().splitlines()) == len(list(kept.glob("*.png"))) == 5
    resumed = fit(run_cli, runs, "half", "--ckpt_path", str(half))
    one, other = (read_checkpoint(str(path)) for path in (whole, resumed))
    assert one["global_step"] == other["global_step"] == 2
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "random_states"):
        assert not tiny.differing(one[part], other[part]), part
    assert not [name for name in one["state_dict"] if "teacher" in name]
    assert {value.dtype for value in one["state_dict"].values()} == {torch.float32}

    Path("two.txt").write_text("a red circle\na blue circle\n")
    main(["consolidate", str(whole), "plain.ckpt"])
    assert "plain.ckpt: " in capsys.readouterr().out
    plain = read_checkpoint("plain.ckpt")
    assert not tiny.differing(plain, one)
    for name in (str(whole), "plain.ckpt"):
        main(["export", name, f"export_of_{Path(name).stem}", "--trust", "tiny"])
        main(["sample", name, "two.txt", f"pictures_of_{Path(name).stem}", "--trust", "tiny"])
    for kind in ("export_of", "pictures_of"):
        files = sorted(p.relative_to(f"{kind}_last") for p in Path(f"{kind}_last").rglob("*") if p.is_file())
        assert files
        for file in files:
            one_file, other_file = Path(f"{kind}_last") / file, Path(f"{kind}_plain") / file
            if file.suffix == ".safetensors":
                assert one_file.read_bytes() == other_file.read_bytes()
            if file.suffix == ".png":  # their metadata name the checkpoints
                assert Image.open(one_file).tobytes() == Image.open(other_file).tobytes()
    from diffusers import StableDiffusion3Pipeline

    weights = StableDiffusion3Pipeline.from_pretrained(
        "export_of_last", text_encoder_3=None, tokenizer_3=None
    ).transformer.state_dict()
    for name, value in weights.items():
        assert torch.equal(value, one["state_dict"][f"roles.ema.{name}"].to(value.dtype)), name
    table = ["--checkpoint", f"sharded={whole}", "--trust", "tiny"]
    main(["evaluate", *table, "--count", "6", "--teacher_steps", "1", "--out", "scores"])
    (scores,) = Path("scores").rglob("scores.json")
    assert "sharded" in scores.read_text()


def test_zero3_overlay_turns_off_adapters_and_shards_every_role():
    from gdmd_lightning.configuration.training import parse

    parsed = parse(["--config", "sd3.yaml", "--config", "zero3.yaml"])
    assert parsed.model.init_args.lora is None
    assert parsed.trainer.strategy.class_path.endswith("MultiEngineDeepSpeedStrategy")
    assert parsed.trainer.strategy.init_args.stage == 3
    written = yaml.safe_load((shipped_configs() / "zero3.yaml").read_text())
    assert set(written) == {"trainer", "model"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.lora.rank=2"], "ZeRO 3 cannot shard the adapter of 'generator'"),
        (["--trainer.strategy.stages={critic: 1}"], "no role 'critic' is trained; use generator, fake_score"),
        (["--trainer.strategy.config={gradient_cliping: 1}"], "(did you mean 'gradient_clipping'?)"),
        (["--trainer.strategy.configs={critic: {}}"], "trainer.strategy.configs: no role 'critic' is trained; use gen"),
        (
            ["--trainer.strategy.configs={fake_score: {gradient_clipping: 1.0}, frozen: {}}"],
            "gradient_clipping has no effect on 'fake_score', which has its own; set model.fake_score.gradient_clip",
        ),
        (["--trainer.strategy.config={gradient_clipping: 1.0}"], "set model.generator.gradient_clip"),
        (["--trainer.strategy.config={bf16: {enabled: true}}"], "bf16 would round the weights of 'generator'"),
        (["--model.generator.algorithm=adamw_8bit"], "adamw_8bit"),
        (["--trainer.strategy.stage=4"], "trainer.strategy.stage: expected one of 1, 2, 3, got '4'; see"),
        (["--trainer.strategy.config={optimizer: {}}"], "the module decides this, leave it out"),
    ],
)
def test_settings_that_cannot_work_are_one_line_before_training(complaint, fast_fit, arguments, message):
    assert message in complaint("fit", *fast_fit, "--config", "zero3.yaml", "--trainer.devices=1", *arguments)


def test_consolidate_refuses_what_is_not_in_shards(complaint, tmp_path):
    assert "no checkpoint" in complaint("consolidate", tmp_path / "missing.ckpt", tmp_path / "out.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    assert "is a plain checkpoint already" in complaint("consolidate", tmp_path / "plain.ckpt", tmp_path / "out.ckpt")
    assert "exists" in complaint("consolidate", tmp_path / "plain.ckpt", tmp_path / "plain.ckpt")
    (tmp_path / "empty.ckpt").mkdir()
    assert "no checkpoint" in complaint("consolidate", tmp_path / "empty.ckpt", tmp_path / "out.ckpt")
