"""What can be wrong with a teacher, its adapters, its cache and its export ends in one line, nothing half-written."""

import shutil
import subprocess
import sys

import pytest
import tiny

ADAPTERS = ["--model.lora.rank=2", "--model.lora.alpha=2"]


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny.save_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.mark.parametrize("config", ["sdxl.yaml", "flux2.yaml"])
def test_a_configuration_of_another_family_is_told(complaint, tiny_pipeline, config):
    told = complaint("fit", "--config", config, f"--model.family.path={tiny_pipeline}", "--data.source=shapes")
    assert "holds a StableDiffusion3Pipeline, not a" in told
    assert "choose the family that matches it" in told


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder_2", "scheduler"])
def test_a_missing_component_is_told(complaint, fast_fit, tiny_pipeline, tmp_path, part):
    copy = shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    shutil.rmtree(copy / part)
    assert f"lacks its component {part!r}" in complaint("fit", *fast_fit, f"--model.family.path={copy}")


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_a_resolution_that_does_not_fit_is_told(complaint, fast_fit, command):
    told = complaint(command, *fast_fit, "--model.height=30")
    assert told.startswith("resolution: 30x32 is not a multiple of 8 pixels; use a multiple of 8")


@pytest.mark.parametrize("command", ["fit", "plan"])
def test_an_adapter_for_nothing_is_told_with_what_would_be_right(complaint, fast_fit, command):
    told = complaint(command, *fast_fit, *ADAPTERS, "--model.lora.targets=['to_qq']")
    assert told.startswith("model.lora.targets: LoRA target 'to_qq' matches no module of the network; ")
    assert "to_add_out" in told


def test_a_cache_of_another_model_is_told(complaint, fast_fit, tmp_path):
    from gdmd_lightning.cli import main

    (tmp_path / "prompts.txt").write_text("a red circle\na green square\n")
    cached = [f"--model.embedding_cache.directory={tmp_path / 'cache'}", f"--data.source={tmp_path / 'prompts.txt'}"]
    once = [*fast_fit, *cached, "--trainer.max_steps=1", "--trainer.callbacks=ModelCheckpoint"]
    main(["fit", *once])
    other = tiny.save_pipeline(tmp_path / "other", seed=1)
    told = complaint("fit", *once, f"--model.family.path={other}")
    assert str(tmp_path / "cache") in told
    assert "embeddings of another model" in told


def test_a_start_without_the_adapters_is_told(complaint, fast_fit, recorded_run):
    last = recorded_run / "checkpoints" / "last.ckpt"
    told = complaint("fit", *fast_fit, *ADAPTERS, f"--model.start_from={last}")
    assert "its generator is not this model's; use the same family, size and adapters" in told


def test_an_optimizer_that_is_not_installed_is_told_before_anything_is_loaded(complaint, fast_fit, monkeypatch):
    import importlib.util

    from gdmd_lightning.families.sd3 import SD3Family

    found = importlib.util.find_spec
    absent = lambda name, *more: None if name == "bitsandbytes" else found(name, *more)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", absent)
    monkeypatch.setattr(SD3Family, "load", lambda self: pytest.fail("loaded"))
    told = complaint("fit", *fast_fit, "--model.critic.algorithm=adamw_8bit")
    assert told.startswith("optimizer algorithm: adamw_8bit is bitsandbytes', which is not installed; pip install")


FULL = """
import resource, signal, sys
from gdmd_lightning.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
main(["export", sys.argv[2], sys.argv[3]])
"""


@pytest.mark.parametrize("room", [300, 60_000])
def test_a_disk_that_fills_up_while_exporting_leaves_nothing(recorded_run, tmp_path, room):
    """With a limit on files' sizes the kernel refuses a write half way, as it does where no space is left."""
    from conftest import cli_environment

    out = tmp_path / "pipeline"
    arguments = [sys.executable, "-c", FULL, str(room), str(recorded_run / "checkpoints" / "last.ckpt"), str(out)]
    done = subprocess.run(arguments, env=cli_environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"gdmd_lightning: error: export: cannot write {str(out)!r}: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []
