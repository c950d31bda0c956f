"""The shipped configurations parse, plan and train, on tiny pipelines of their families."""

import json
import re

import published
import pytest
import tiny
import torch
import yaml
from tiny_detector import save_mask2former

from gdmd_lightning.callbacks.logged_figures import read_figures
from gdmd_lightning.cli import main
from gdmd_lightning.configuration.restore import build_module
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.locations import shipped_configs

REAL = {
    "sd3": tiny.save_pipeline,
    "sd35": tiny.save_pipeline,
    "sdxl": tiny.save_sdxl,
    "flux2": tiny.save_flux2,
}
# What differs for a tiny pipeline: its size, shorter training, and a reward that needs no download.
TINY = {
    "trainer": {
        "max_steps": 3,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "callbacks": [
            {"class_path": "ModelCheckpoint", "init_args": {"save_last": True, "save_top_k": 0}},
            {"class_path": "GradientRewardRecord"},
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
}


@pytest.mark.parametrize("family", REAL)
def test_config_values_name_their_source_or_say_ours(family):
    text = (shipped_configs() / f"{family}.yaml").read_text()
    keys = ("guidance_scale", "fake_score_updates", "learning_rate", "lora:", "renoise_distribution:", "ema_decay")
    for line in text[text.index("model:") :].splitlines():
        if any(key in line for key in keys):
            assert re.search(r"# .*(RTDMD|DMD2|ours)", line), line


# Each family, alone or under its own overlay, and each overlay.
PAIRS = [(family, overlay) for family in REAL for overlay in ("", "cold_start", "lora_24gb")]
PRINTED = [("sd3", ""), ("sd3", "cold_start"), *((family, "lora_24gb") for family in REAL)]


@pytest.mark.parametrize(
    ("family", "overlay"), [p if p in PRINTED else pytest.param(*p, marks=pytest.mark.slow) for p in PAIRS]
)
def test_config_of_a_published_model_prints(family, overlay, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["fit", "--config", f"{family}.yaml"]
    if overlay:
        arguments += ["--config", overlay_name(family, overlay)]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--print_config"])
    assert left.value.code in (0, None)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["class_path"].endswith("DMD" if overlay == "cold_start" else "GDMD")
    assert printed["model"]["init_args"]["lora"]["rank"] >= 32


def overlay_name(family: str, overlay: str) -> str:
    return f"{family}_{overlay}.yaml" if overlay == "lora_24gb" else f"{overlay}.yaml"


# The families' own tests train each class of pipeline.
FAST = {("sdxl", "cold_start")}
CASES = [(family, overlay) for family in REAL for overlay in ("cold_start", "lora_24gb")]


@pytest.mark.parametrize(
    ("family", "overlay"), [c if c in FAST else pytest.param(*c, marks=pytest.mark.slow) for c in CASES]
)
def test_config_of_a_published_model_plans_and_trains_on_a_tiny_pipeline(
    family, overlay, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    pipeline = REAL[family](tmp_path / "pipeline")
    mine = json.loads(json.dumps(TINY))
    path = {"path": str(pipeline)}
    if family == "flux2":
        path |= {"max_sequence_length": 16, "text_layers": [1, 2]}
    mine["model"]["init_args"]["family"] = {"init_args": path}
    if overlay == "lora_24gb":
        mine["data"] = {}
    else:
        for key in ("reward", "targets"):
            del mine["model"]["init_args"][key]
        del mine["trainer"]["callbacks"]
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(mine))
    overlays = ["--config", overlay_name(family, overlay), "--config", "tiny.yaml"]
    main(["plan", "--config", f"{family}.yaml", *overlays])
    assert "peak in total" in capsys.readouterr().out
    main(["fit", "--config", f"{family}.yaml", *overlays])
    (last,) = (tmp_path / "runs").rglob("last.ckpt")
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in state["state_dict"].values())
    assert len(list((tmp_path / "runs").glob("*_embeddings/*.safetensors"))) == (overlay == "lora_24gb")


def replaced(settings, names):
    """Settings in which every hub id is a local path."""
    if isinstance(settings, dict):
        return {key: replaced(value, names) for key, value in settings.items()}
    if isinstance(settings, list):
        return [replaced(value, names) for value in settings]
    return names.get(settings, settings) if isinstance(settings, str) else settings


@pytest.mark.parametrize("ocr", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sd3_trains_on_published_rewards_and_computes_geneval_hps_and_ocr_at_checkpoints(tmp_path, monkeypatch, ocr):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\ntwo blue squares\na green triangle\n")
    (tmp_path / "written.txt").write_text('a sign that says "open"\na sign that says "closed"\n')
    architecture = published.open_clip_architecture(tmp_path)
    clip = str(published.save_clip(tmp_path / "clip"))
    mine = replaced(
        yaml.safe_load((shipped_configs() / "sd3.yaml").read_text()),
        {
            "stabilityai/stable-diffusion-3-medium-diffusers": str(tiny.save_pipeline(tmp_path / "pipeline")),
            "xswu/HPSv2": str(published.save_hps(tmp_path / "HPS_v2.1_compressed.pt", architecture)),
            "yuvalkirstain/PickScore_v1": clip,
            "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": clip,
            "openai/clip-vit-large-patch14": clip,
            "facebook/mask2former-swin-small-coco-instance": str(save_mask2former(tmp_path / "detector")),
        },
    )
    small = json.loads(json.dumps(TINY))
    del small["model"]["init_args"]["reward"], small["trainer"]["callbacks"]
    small["trainer"] |= {"precision": "32-true", "max_steps": 2, "log_every_n_steps": 1}
    evaluation = next(c for c in mine["trainer"]["callbacks"] if c["class_path"] == "GenerationEvaluation")
    options = evaluation["init_args"]
    options |= {"count": 6, "every_n_updates": 1, "teacher_steps": 2, "columns": 0}
    hps, geneval = options["scores"][1]["init_args"]["reward"]["init_args"], options["scores"][0]
    geneval["init_args"]["detector"]["init_args"] |= {"shortest_edge": 64, "longest_edge": 96}
    judged = mine["model"]["init_args"]["reward"]["init_args"]["rewards"][0]["init_args"]
    for each in (hps, judged):
        each |= {"architecture": architecture}
    reading = {"class_path": "RewardScore", "init_args": {"reward": {"class_path": "OCRReward"}}}
    written = {"prompts": "written.txt", "count": 2, "scores": [reading], "score_teacher": False}
    if ocr:
        mine["trainer"]["callbacks"].append({"class_path": "GenerationEvaluation", "init_args": {**options, **written}})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(mine))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(small))
    main(["fit", "--config", "mine.yaml", "--config", "small.yaml"])
    figures = read_figures(tmp_path / "runs" / "sd3" / "version_0", "")
    names = ["eval/geneval/overall", "eval/hpsv2/overall", "teacher/hpsv2/overall"]
    for name in (*names, "eval/ocr/overall") if ocr else names:
        assert [update for update, _ in figures[name]] == [1, 2], name
    assert {"eval/geneval/counting", "eval/geneval/color_attr"} <= figures.keys()
    parts = [float(figures[f"train/reward/{name}"][-1][1]) for name in ("hpsv2", "pickscore", "clip_score")]
    assert len(set(parts)) == 3


OVERLAYS = sorted(path.name for path in shipped_configs().glob("shapes_*.yaml") if path.name != "shapes_teacher.yaml")


def leaves(values, at=()):
    """Paths and values of a nested mapping."""
    if isinstance(values, dict):
        return {path: leaf for key, value in values.items() for path, leaf in leaves(value, (*at, key)).items()}
    return {at: values}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_of_a_method_on_shapes_builds_that_method_with_its_values(overlay):
    written = yaml.safe_load((shipped_configs() / overlay).read_text())["model"]
    parsed = parse(["--config", "shapes.yaml", "--config", overlay]).model
    assert type(build_module(parsed)).__name__ == written["class_path"]
    found = leaves(parsed.as_dict()["init_args"])
    for path, value in leaves(written.get("init_args", {})).items():
        if path[-1] == "class_path":
            assert found[path].rsplit(".", 1)[-1] == value
        else:
            assert found[path] == value, path


@pytest.mark.parametrize("overlay", ["dmdr", "refl", "rtdmd"])
def test_another_reward_does_not_take_the_name_of_the_configured_one(overlay):
    given = ["--config", "shapes.yaml", "--config", f"shapes_{overlay}.yaml", "--model.reward", "ShapesReward"]
    assert parse(given, "fit").model.init_args.reward.init_args.name == "shapes"


@pytest.mark.slow
@pytest.mark.parametrize("family", REAL)
def test_config_with_adapters_fits_24_gb(family, capsys):
    main(["plan", "--config", f"{family}.yaml", "--config", f"{family}_lora_24gb.yaml", "--gpu_memory", "24"])
    said = capsys.readouterr().out
    assert "fits in 24 GiB: yes" in said
    assert "\nevaluation   " in said
