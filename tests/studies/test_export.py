"""An exported generator is a plain diffusers pipeline that makes the same pictures from the same noise."""

import copy

import pytest
import tiny
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.roles import LoRA
from gdmd_lightning.samplers import CPS, Renoise
from gdmd_lightning.studies.export import export, snippet

TEXTS = ["a red circle", "two blue squares left of a green triangle"]


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def restored(recorded_run):
    return load_module(str(recorded_run / "checkpoints" / "last.ckpt"), trust=["tiny"])


@pytest.fixture
def module(restored):
    """A copy that a test may change."""
    return copy.deepcopy(restored)


def load(path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline, noise, steps=4) -> torch.Tensor:
    """Call the pipeline as the snippet does, with given noise."""
    settings = {"num_inference_steps": steps, "guidance_scale": 1.0, "max_sequence_length": 0}
    return pipeline(TEXTS, **settings, latents=noise.clone(), output_type="pt").images


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_export_pipeline_makes_the_same_pictures_from_the_same_noise(module, tmp_path, noise, steps):
    module.steps = steps
    module.sigmas = module.family.few_step_sigmas(steps, module.latent_shape)
    path = export(module, tmp_path / "pipeline")
    torch.testing.assert_close(pictures(load(path), noise, steps), module.generate(noise, TEXTS), atol=1e-4, rtol=0)


def test_export_renoising_pipeline_makes_the_same_pictures_from_the_same_noise(module, tmp_path, noise):
    module.sampler = Renoise()
    pipeline = load(export(module, tmp_path / "pipeline"))
    torch.manual_seed(5)  # diffusers' scheduler draws from torch's global stream
    theirs = pictures(pipeline, noise)
    ours = module.generate(noise, TEXTS, rngs=torch.Generator().manual_seed(5))
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    torch.manual_seed(6)
    assert not torch.allclose(pictures(pipeline, noise), theirs, atol=1e-3)


def test_export_takes_averaged_weights_by_default(module, tmp_path):
    averaged = load(export(module, tmp_path / "averaged")).transformer
    present = load(export(module, tmp_path / "present", averaged=False)).transformer
    for mine, theirs in ((module.roles.ema, averaged), (module.roles.generator, present)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(averaged.proj_out.weight, present.proj_out.weight)


def test_export_refuses_cps_and_writes_nothing(module, tmp_path):
    module.sampler = CPS()
    with pytest.raises(UserError, match="no scheduler for CPS"):
        export(module, tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lora", [None, LoRA(2, 4)], ids=["copies", "adapters"])
def test_run_that_cannot_be_exported_says_so_before_training(tiny_pipeline, caplog, lora):
    with caplog.at_level("INFO"):
        tiny.train(tiny.module(tiny_pipeline, DMD, sampler=CPS(), lora=lora), 1)
    expected = "export --form lora works, without a scheduler" if lora else "sample works"
    line = "warning: this run cannot be exported as a pipeline (sampler: diffusers has no scheduler for CPS; "
    assert [m for m in caplog.messages if m.startswith(line) and m.endswith(f"; {expected}")]


def test_run_that_can_be_exported_says_nothing(tiny_pipeline, caplog):
    with caplog.at_level("INFO"):
        tiny.train(tiny.module(tiny_pipeline, DMD), 1)
    assert "cannot be exported" not in caplog.text


def test_sdxl_in_a_number_of_steps_that_no_scheduler_takes_is_refused_and_its_adapter_is_not(tmp_path):
    family = SDXLFamily(str(tiny.save_sdxl(tmp_path / "sdxl")))
    module = DMD(family, height=32, width=32, steps=3, sampler=Renoise(), lora=LoRA(2, 4))
    module.configure_model()
    with pytest.raises(UserError, match="3 steps do not divide 1000 timesteps"):
        export(module, tmp_path / "out")
    check_bare_adapter(export(module, tmp_path / "out", form="lora"), "3 steps do not divide 1000 timesteps")


def test_adapter_of_a_sampler_without_scheduler_is_exported(tiny_pipeline, tmp_path):
    module = tiny.module(tiny_pipeline, DMD, sampler=CPS(), lora=LoRA(2, 4))
    module.configure_model()
    check_bare_adapter(export(module, tmp_path / "out", form="lora"), "diffusers has no scheduler for CPS")


def check_bare_adapter(out, why):
    assert {p.name for p in out.iterdir()} == {"README.md", "pytorch_lora_weights.safetensors"}
    card = (out / "README.md").read_text()
    assert f"| Scheduler | none: {why} |" in card
    assert f"# These are not this generator's steps: {why}." in card
    assert "pipe.scheduler" not in card


def test_export_that_fails_leaves_no_directory(module, tmp_path, monkeypatch):
    def save(pipeline, path, **options):
        path.mkdir(exist_ok=True)
        (path / "model_index.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_pretrained", save)
    with pytest.raises(UserError, match=r"cannot write .*no space left"):
        export(module, tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    load(export(module, tmp_path / "pipeline"))


def test_snippet_has_two_lines(module, tmp_path):
    assert len(snippet(module, tmp_path).splitlines()) == 2


def test_snippet_makes_pictures_of_the_trained_size(tiny_pipeline, tmp_path, monkeypatch):
    module = tiny.module(tiny_pipeline)
    module.height, module.width = 16, 32
    module.configure_model()
    path = export(module, tmp_path / "pipeline")
    assert "height=16, width=32" in (path / "README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(f"import diffusers\n{snippet(module, path)}")
    with Image.open("picture.png") as picture:
        assert (picture.height, picture.width) == (16, 32)
