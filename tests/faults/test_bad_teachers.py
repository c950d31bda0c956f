"""Errors of pipelines, adapters, embedding caches and exports are one line, and leave no partial files."""

import shutil
import subprocess
import sys

import pytest
import tiny

ADAPTERS = ["--model.lora.rank=2", "--model.lora.alpha=2"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny.save_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.mark.parametrize("config", [pytest.param("sdxl.yaml", marks=pytest.mark.slow), "flux2.yaml"])
def test_fit_reports_a_pipeline_of_another_family(complaint, tiny_pipeline, config):
    message = complaint("fit", "--config", config, f"--model.family.path={tiny_pipeline}", "--data.source=shapes")
    assert "holds a StableDiffusion3Pipeline, not a" in message
    assert "choose the family that matches it" in message


# test_bad_input.py removes components without fit.
@pytest.mark.parametrize(
    "part", ["vae", *(pytest.param(p, marks=pytest.mark.slow) for p in ("transformer", "text_encoder_2", "scheduler"))]
)
def test_fit_reports_a_missing_component(complaint, fast_fit, tiny_pipeline, tmp_path, part):
    copy = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    shutil.rmtree(copy / part)
    assert f"lacks its component {part!r}" in complaint("fit", *fast_fit, f"--model.family.path={copy}")


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_fit_and_plan_report_an_unsupported_resolution(complaint, fast_fit, command):
    message = complaint(command, *fast_fit, "--model.height=30")
    assert message.startswith("resolution: 30x32 is not a multiple of 8 pixels; use a multiple of 8")


@pytest.mark.parametrize("command", [pytest.param("fit", marks=pytest.mark.slow), "plan"])
def test_fit_and_plan_report_an_unknown_adapter_target_and_list_others(complaint, fast_fit, command):
    message = complaint(command, *fast_fit, *ADAPTERS, "--model.lora.targets=['to_qq']")
    assert message.startswith("model.lora.targets: LoRA target 'to_qq' matches no module of the network; ")
    assert "to_add_out" in message


# data/test_embedding_cache.py and methods/test_checkpointing.py try these two without fit.
@pytest.mark.slow
def test_fit_reports_an_embedding_cache_of_another_model(complaint, fast_fit, tmp_path):
    from gdmd_lightning.cli import main

    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    cached = [f"--model.embedding_cache.directory={tmp_path / 'cache'}", f"--data.source={tmp_path / 'prompts.txt'}"]
    once = [*fast_fit, *cached, "--trainer.max_steps=1", "--trainer.callbacks=ModelCheckpoint"]
    main(["fit", *once])
    other = tiny.save_pipeline(tmp_path / "other", seed=1)
    message = complaint("fit", *once, f"--model.family.path={other}", "--trainer.logger.init_args.name=other")
    assert str(tmp_path / "cache") in message
    assert "embeddings of another model" in message


@pytest.mark.slow
def test_fit_reports_start_from_a_checkpoint_without_adapters(complaint, fast_fit, recorded_run):
    last = recorded_run / "checkpoints" / "last.ckpt"
    message = complaint("fit", *fast_fit, *ADAPTERS, f"--model.start_from={last}")
    assert "its generator is not this model's; use the same family, size and adapters" in message


def test_fit_reports_a_missing_optimizer_before_loading(complaint, fast_fit, monkeypatch):
    import importlib.util

    from gdmd_lightning.families.sd3 import SD3Family

    found = importlib.util.find_spec
    absent = lambda name, *more: None if name == "bitsandbytes" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.setattr(SD3Family, "load", lambda self: pytest.fail("loaded"))
    message = complaint("fit", *fast_fit, "--model.fake_score.algorithm=adamw_8bit")
    assert message.startswith(
        "optimizer algorithm: adamw_8bit requires bitsandbytes, which is not installed; pip install"
    )


FULL = """
import resource, signal, sys
from gdmd_lightning.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(["export", sys.argv[2], sys.argv[3]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [300, 60_000])
def test_export_to_a_full_disk_leaves_no_files(recorded_run, tmp_path, room):
    """A limit on file sizes makes the kernel refuse a write halfway, as on a full disk."""
    from conftest import cli_environment

    out = tmp_path / "pipeline"
    arguments = [sys.executable, "-c", FULL, str(room), str(recorded_run / "checkpoints" / "last.ckpt"), str(out)]
    done = subprocess.run(arguments, env=cli_environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"gdmd_lightning: error: export: cannot write {str(out)!r}: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
