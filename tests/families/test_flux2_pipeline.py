"""Sampling FLUX.2 klein equals diffusers' own pipeline, and exported pipelines reproduce our images."""

import json
import shutil

import pytest
import tiny
import torch

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.samplers import ODE, rollout
from gdmd_lightning.studies.export import export

TEXTS = ["a red circle", "two blue squares left of a green triangle"]
CALL = {
    "height": 32,
    "width": 32,
    "output_type": "pt",
    "max_sequence_length": 24,
    "text_encoder_out_layers": (1, 3),
}


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save_flux2(tmp_path_factory.mktemp("flux2") / "pipeline")


@pytest.fixture(scope="module")
def module(saved):
    module = DMD(Flux2KleinFamily(str(saved), max_sequence_length=24, text_layers=(1, 3)), height=32, width=32)
    module.configure_model()
    module.family.loaded.set_progress_bar_config(disable=True)
    return module


@pytest.mark.parametrize(("steps", "guidance_scale"), [(4, 3.0), (7, 1.0)])
def test_teacher_reproduces_its_pipeline(module, noise, steps, guidance_scale):
    ours = module.generate_teacher(noise, TEXTS, steps, guidance_scale)
    theirs = module.family.loaded(
        prompt=TEXTS, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise.clone(), **CALL
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("steps", [1, 4])
def test_exported_sampler_reproduces_our_images(module, noise, steps):
    family, network = module.family, module.roles.generator
    pipeline = family.to_pipeline(network, steps, module.latent_shape, stochastic=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompt=TEXTS, num_inference_steps=steps, guidance_scale=1.0, latents=noise.clone(), **CALL).images
    predict = module.predictor("generator", family.encode(TEXTS))
    sigmas = family.few_step_sigmas(steps, module.latent_shape)
    ours = family.decode(rollout(predict, noise, sigmas, ODE()).x0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert family.to_pipeline(network, steps, module.latent_shape, stochastic=True).scheduler.config.stochastic_sampling


def test_few_step_sigmas_are_larger_for_more_tokens(module):
    few, many = (module.family.few_step_sigmas(4, module.family.latent_shape(side, side)) for side in (32, 1024))
    assert module.family.latent_shape(32, 32) == (8, 8, 8)
    assert (many[1:-1] > few[1:-1]).all()
    assert few[0] == many[0] == 1
    assert few[-1] == many[-1] == 0


def test_decode_inverts_encode_images_like_the_autoencoder_with_gradient(module):
    family = module.family
    images = torch.rand(2, 3, 32, 32)
    latents = family.encode_images(images)
    plain = family.loaded.vae.encode(images * 2 - 1).latent_dist.mode()
    torch.testing.assert_close(
        family.decode(latents), (family.loaded.vae.decode(plain).sample / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0
    )
    latents.requires_grad_()
    family.decode(latents).mean().backward()
    assert latents.grad.abs().sum() > 0


def test_family_refuses_a_wrong_resolution_layer_count_or_pipeline(saved, module):
    with pytest.raises(UserError, match="34x32 is not a multiple of 4 pixels"):
        module.family.latent_shape(34, 32)
    with pytest.raises(UserError, match="the text encoder has 3 layers, not 27"):
        Flux2KleinFamily(str(saved)).load()
    with pytest.raises(UserError, match="holds a Flux2KleinPipeline, not a StableDiffusion3Pipeline"):
        tiny.family(saved)


@pytest.mark.parametrize(
    ("name", "settings", "problem"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}, "the steps of a UniPCMultistepScheduler are not known"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "the scheduler's levels are inverted"),
    ],
)
def test_a_scheduler_with_other_levels_is_refused(saved, tmp_path, name, settings, problem):
    import diffusers

    path = tmp_path / "pipeline"
    shutil.copytree(saved, path)
    getattr(diffusers, name)(**settings).save_pretrained(path / "scheduler")
    index = path / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", name]}))
    with pytest.raises(UserError, match=rf"family\.path: {problem}"):
        Flux2KleinFamily(str(path), max_sequence_length=24, text_layers=(1, 3)).sketch()


@pytest.mark.parametrize("way", ["load", "sketch"])
@pytest.mark.parametrize("layers", [(), (1,), (1, 2, 3)])
def test_another_number_of_text_layers_than_the_network_takes_is_refused(saved, layers, way):
    family = Flux2KleinFamily(str(saved), max_sequence_length=24, text_layers=layers)
    with pytest.raises(UserError, match=rf"family\.text_layers: {len(layers)} layers of width 16 .*; give 2 layers"):
        getattr(family, way)()


@pytest.mark.parametrize("method", ["DMD", pytest.param("GDMD", marks=pytest.mark.slow)])
def test_command_line_trains_resumes_and_exports_for_diffusers(method, saved, fast_fit, tmp_path, noise):
    from diffusers import Flux2KleinPipeline

    from gdmd_lightning.cli import main

    overlay = tmp_path / "flux2.yaml"
    arguments = f"{{path: {saved}, max_sequence_length: 24, text_layers: [1, 3]}}"
    overlay.write_text(f"model: {{init_args: {{family: {{class_path: Flux2KleinFamily, init_args: {arguments}}}}}}}\n")
    config = [*fast_fit, *(["--config", "shapes_dmd.yaml"] if method == "DMD" else []), "--config", str(overlay)]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    plain = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    main(["fit", *config, *plain, "--trainer.max_steps=2"])
    main(["fit", *config, *plain, "--trainer.max_steps=3", f"--ckpt_path={last}"])
    module = load_module(str(last), trust=["tiny"])
    assert type(module).__name__ == method
    pipe = Flux2KleinPipeline.from_pretrained(export(module, tmp_path / "out"))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(prompt=TEXTS, num_inference_steps=4, guidance_scale=1.0, latents=noise.clone(), **CALL).images
    torch.testing.assert_close(module.generate(noise, TEXTS), theirs, atol=1e-4, rtol=0)
