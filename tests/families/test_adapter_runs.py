"""LoRA runs of every family: trained, resumed and exported by the command line, then sampled by diffusers."""

import json

import diffusers
import pytest
import tiny
import torch

from gdmd_lightning.cli import main
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.samplers import ODE, Renoise
from gdmd_lightning.studies.export import export

TEXTS = ["a red circle", "two blue squares left of a green triangle"]


def save_guided(path):
    return tiny.save_flux2(path, klein=False)


FAMILIES = {
    "sd3": (tiny.save_pipeline, "SD3Family", {"max_sequence_length": 0}),
    "sdxl": (tiny.save_sdxl, "SDXLFamily", {}),
    "flux2": (tiny.save_flux2, "Flux2KleinFamily", {"max_sequence_length": 16, "text_layers": [1, 2]}),
    "flux2, guided": (save_guided, "Flux2Family", {"max_sequence_length": 512, "text_layers": [1, 2]}),
}


# Guidance that is told to the network differs from Klein in one input only; test_configs.py trains SDXL, too.
SLOW = ("sdxl", "flux2, guided")


@pytest.fixture(scope="module", params=[pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in FAMILIES])
def trained(request, tmp_path_factory):
    """Three updates on a tiny pipeline, resumed after two: pipeline, last checkpoint, weights after two.

    The run evaluates its images and writes a record, like any other run.
    """
    from conftest import write_fast_config

    save, name, arguments = FAMILIES[request.param]
    place = tmp_path_factory.mktemp(request.param[:5])
    pipeline = save(place / "pipeline")
    overlay = place / "family.yaml"
    family = f"{{class_path: {name}, init_args: {{path: {pipeline}, {str(arguments)[1:-1]}}}}}"
    lora = "lora: {rank: 4, alpha: 8}, memory: {gradient_checkpointing: true, vae_slicing: true, reward: offloaded}"
    overlay.write_text(f"model: {{init_args: {{family: {family}, {lora}}}}}\n")
    config = [*write_fast_config(place / "fast.yaml", pipeline, place), "--config", str(overlay)]
    last = place / "run" / "checkpoints" / "last.ckpt"
    main(["fit", *config, "--trainer.max_steps=2"])
    two = torch.load(last, weights_only=True)["state_dict"]
    main(["fit", *config, "--trainer.max_steps=3", f"--ckpt_path={last}"])
    return pipeline, last, two


def with_visible_adapters(checkpoint):
    """The module of a checkpoint; after three updates the images would differ by less than rounding errors."""
    module = load_module(str(checkpoint), trust=["tiny"])
    with torch.no_grad():
        for name, parameter in module.roles.named_parameters():
            if ".lora_B.ema." in name:
                parameter.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return module


def call(pipe, module, noise):
    pipe.set_progress_bar_config(disable=True)
    more = module.family.sampling_arguments()
    size = {"height": 32, "width": 32, "output_type": "pt"}
    return pipe(prompt=TEXTS, num_inference_steps=4, guidance_scale=1.0, latents=noise.clone(), **size, **more).images


def noise_for(module):
    return torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(5))


def test_checkpoint_contains_only_adapters_and_all_of_them_change(trained):
    _, last, two = trained
    three = torch.load(last, weights_only=True)["state_dict"]
    assert three.keys() == two.keys()
    assert all(".lora_" in name for name in three)
    for role in ("generator", "fake_score", "ema", "old"):
        names = [name for name in three if f".{role}." in name]
        assert names
        assert any(not torch.equal(two[name], three[name]) for name in names), role


def test_exported_pipeline_reproduces_our_images(trained, tmp_path):
    pipeline, last, _ = trained
    module = with_visible_adapters(last)
    out = export(module, tmp_path / "pipeline")
    kind, absent = getattr(diffusers, module.family.pipeline_class), module.family.loading_arguments()
    pipe = kind.from_pretrained(out, **absent)
    noise = noise_for(module)
    ours = module.generate(noise, TEXTS)
    torch.testing.assert_close(ours, call(pipe, module, noise), atol=1e-4, rtol=0)
    base = kind.from_pretrained(pipeline, **absent, scheduler=pipe.scheduler)
    assert float((ours - call(base, module, noise)).abs().max()) > 1e-3


def test_exported_adapter_on_the_teachers_pipeline_reproduces_our_images(trained, tmp_path):
    pipeline, last, _ = trained
    module = with_visible_adapters(last)
    noise = noise_for(module)
    ours = module.generate(noise, TEXTS)
    out = export(module, tmp_path / "lora", form="lora")
    card = (out / "README.md").read_text()
    code = card.split("```python\n")[1].split("pipe(prompt")[0].replace('"lora"', f'"{out}"')
    space: dict = {}
    exec(code, space)
    assert str(pipeline) in code
    assert {p.name for p in out.iterdir()} == {"README.md", "pytorch_lora_weights.safetensors", "scheduler"}
    torch.testing.assert_close(ours, call(space["pipe"], module, noise), atol=1e-4, rtol=0)
    space["pipe"].unload_lora_weights()
    assert float((ours - call(space["pipe"], module, noise)).abs().max()) > 1e-3


@pytest.mark.parametrize("sampler", [ODE(), Renoise()], ids=["ode", "renoise"])
def test_card_loads_the_saved_scheduler(trained, tmp_path, sampler):
    module = load_module(str(trained[1]), trust=["tiny"])
    module.sampler = sampler
    out = export(module, tmp_path / "lora", form="lora")
    saved = json.loads((out / "scheduler" / "scheduler_config.json").read_text())["_class_name"]
    assert f"pipe.scheduler = diffusers.{saved}.from_pretrained(" in (out / "README.md").read_text()


def test_card_describes_the_training(trained, tmp_path):
    card = (export(load_module(str(trained[1]), role="ema"), tmp_path / "out", form="lora") / "README.md").read_text()
    for row in ("| Method | GDMD |", "| Reward | brightness |", "| Prompts | shapes |", "| Generator updates | 3 |",
                "| Weights | averaged, adapters |", "| Sampler | ODE, 4 steps, no guidance |",
                "| geneval/overall | "):  # fmt: skip
        assert row in card


def test_export_of_an_adapter_refuses_full_weights(recorded_run, tmp_path):
    with pytest.raises(UserError, match="full weights were trained"):
        export(load_module(str(recorded_run / "checkpoints" / "last.ckpt"), role="ema"), tmp_path / "out", form="lora")
