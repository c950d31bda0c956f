"""Sampling SDXL equals diffusers' own pipeline, and exported pipelines reproduce our images."""

import json
import shutil

import pytest
import tiny
import torch

from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.samplers import ODE, rollout
from gdmd_lightning.schedules import UniformTimestep, vp_from_sigma, x0_from_velocity
from gdmd_lightning.streams import streams_of
from gdmd_lightning.studies.export import export

TEXTS = ["a red circle", "two blue squares left of a green triangle"]
CALL = {"height": 32, "width": 32, "output_type": "pt"}


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tiny.save_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")


@pytest.fixture(scope="module", params=[("epsilon", "leading"), ("v_prediction", "trailing"), ("epsilon", "linspace")])
def module(request, tmp_path_factory):
    prediction, spacing = request.param
    path = tiny.save_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline", prediction=prediction, spacing=spacing)
    module = DMD(SDXLFamily(str(path)), height=32, width=32)
    module.configure_model()
    module.family.loaded.set_progress_bar_config(disable=True)
    return module


@pytest.fixture(scope="module")
def saved_module(saved):
    module = DMD(SDXLFamily(str(saved)), height=32, width=32)
    module.configure_model()
    return module


@pytest.mark.parametrize(("steps", "guidance_scale"), [(4, 3.0), (7, 1.0)])
def test_teacher_reproduces_its_pipeline(module, noise, steps, guidance_scale):
    ours = module.generate_teacher(noise, TEXTS, steps, guidance_scale)
    theirs = module.family.loaded(
        TEXTS, num_inference_steps=steps, guidance_scale=guidance_scale, latents=noise.clone(), **CALL
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EulerDiscreteScheduler", {"final_sigmas_type": "sigma_min"}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "linspace"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
        ("HeunDiscreteScheduler", {}),
        ("PNDMScheduler", {}),
        ("TCDScheduler", {}),
    ],
    ids=str,
)
def test_teacher_is_sampled_with_its_pipelines_own_scheduler(saved_module, noise, name, settings):
    import diffusers

    family = saved_module.family
    before = family.loaded.scheduler
    try:
        family.loaded.scheduler = getattr(diffusers, name).from_config(before.config, **settings)
        family.predicts = family.loaded.scheduler.config.prediction_type
        theirs = family.loaded(
            TEXTS, num_inference_steps=5, guidance_scale=3.0, latents=noise.clone(), generator=streams_of(noise),
            **{**CALL, "output_type": "latent"},
        ).images  # fmt: skip
        with torch.no_grad():
            predict = saved_module.predictor("teacher", family.encode(TEXTS), 3.0)
            ours = family.sample_teacher(predict, noise, 5, streams_of(noise))
    finally:
        family.loaded.scheduler, family.predicts = before, before.config.prediction_type
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)


def test_velocity_gives_the_same_x0_as_the_vp_state(module, noise):
    family, network = module.family, module.roles.teacher
    conditioning, timesteps = family.encode(TEXTS), torch.tensor([150, 820])
    alphas = family.loaded.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    a, s = alphas.sqrt(), (1 - alphas).sqrt()
    ids = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    with torch.no_grad():
        predicted = network(
            noise, timesteps, conditioning.sequence,
            added_cond_kwargs={"text_embeds": conditioning.pooled, "time_ids": ids},
        ).sample  # fmt: skip
    theirs = (noise - s * predicted) / a if family.predicts == "epsilon" else a * noise - s * predicted
    sigma = family.timestep_sigmas[timesteps].float()
    x_sigma = noise / (a + s)
    with torch.no_grad():
        ours = x0_from_velocity(x_sigma, family.velocity(network, x_sigma, sigma, conditioning), sigma)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_error_weight_turns_errors_of_the_velocity_into_those_of_the_prediction(module, noise):
    """The fake score learns with DMD2's loss, that of the noise."""
    family, conditioning = module.family, module.family.encode(TEXTS)
    sigma = torch.tensor([0.3, 0.95])
    predicted, other = torch.randn(2, *noise.shape)
    one, two = (
        family.velocity(lambda *_, answer=each, **__: (answer,), noise, sigma, conditioning)
        for each in (predicted, other)
    )
    found = family.error_weight(sigma)[:, None, None, None] * (one - two).square()
    torch.testing.assert_close(found, (predicted - other).square(), rtol=1e-4, atol=1e-6)


def test_timestep_inverts_the_sigmas_of_the_timesteps(module):
    sigmas = module.family.timestep_sigmas
    assert torch.equal(module.family.timestep(sigmas.float()), torch.arange(1000.0))
    between = (sigmas[:-1] + sigmas[1:]) / 2
    t = module.family.timestep(between.float()[100:900]) - torch.arange(100.0, 900.0)
    assert ((t > 0.3) & (t < 0.7)).all()
    a, _s = vp_from_sigma(sigmas)
    torch.testing.assert_close(a.square(), module.family.loaded.scheduler.alphas_cumprod.double())
    assert module.family.timestep(torch.tensor([1e-4, 0.99])).tolist() == [0, 999]


def test_uniform_timestep_has_the_schedule_of_sdxl(module):
    drawn = UniformTimestep(low=0.0, high=1.0).quantile(torch.tensor([0.0, 0.25, 0.5004, 0.9999]))
    torch.testing.assert_close(drawn, module.family.timestep_sigmas[[0, 250, 500, 999]].float())


def test_empty_prompt_equals_the_pipelines_negative_prompt(module):
    family = module.family
    _, none, _, pooled = family.loaded.encode_prompt("a red circle", do_classifier_free_guidance=True)
    assert torch.equal(family.empty.sequence, none)
    assert torch.equal(family.empty.pooled, pooled)


@pytest.mark.parametrize("steps", [1, 4, 5])
def test_exported_euler_sampler_reproduces_our_images(module, noise, steps):
    family, network = module.family, module.roles.generator
    pipeline = family.to_pipeline(network, steps, module.latent_shape, stochastic=False)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(TEXTS, num_inference_steps=steps, guidance_scale=1.0, latents=noise.clone(), **CALL).images
    predict = module.predictor("generator", family.encode(TEXTS))
    sigmas = family.few_step_sigmas(steps, module.latent_shape)
    ours = family.decode(rollout(predict, noise, sigmas, ODE()).x0)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_exported_renoise_sampler_visits_our_timesteps_or_refuses_the_steps(module):
    pipeline = module.family.to_pipeline(module.roles.generator, 4, module.latent_shape, stochastic=True)
    pipeline.scheduler.set_timesteps(4)
    assert pipeline.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(module.family.timestep(module.sigmas[:-1]), pipeline.scheduler.timesteps.float())
    with pytest.raises(UserError, match="3 steps do not divide"):
        module.family.to_pipeline(module.roles.generator, 3, module.latent_shape, stochastic=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"interpolation_type": "log_linear"},
        {"final_sigmas_type": "sigma_min"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_exported_euler_sampler_visits_our_levels_whatever_the_teachers_spacing(saved, settings):
    from diffusers import EulerDiscreteScheduler

    family = SDXLFamily(str(saved))
    network = family.load()
    family.loaded.scheduler = EulerDiscreteScheduler.from_config(family.loaded.scheduler.config, **settings)
    shape = family.latent_shape(32, 32)
    scheduler = family.to_pipeline(network, 4, shape, stochastic=False).scheduler
    scheduler.set_timesteps(4)
    visited = scheduler.sigmas / (1 + scheduler.sigmas)
    torch.testing.assert_close(visited, family.few_step_sigmas(4, shape), atol=1e-6, rtol=0)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]


def test_exported_renoise_sampler_clips_nothing_whatever_the_teachers_scheduler_does(saved):
    from diffusers import DDIMScheduler

    family = SDXLFamily(str(saved))
    network = family.load()
    family.loaded.scheduler = DDIMScheduler.from_config(
        family.loaded.scheduler.config, clip_sample=True, thresholding=True
    )
    scheduler = family.to_pipeline(network, 4, family.latent_shape(32, 32), stochastic=True).scheduler
    scheduler.set_timesteps(4)
    far = torch.full((1, 4, 8, 8), 50.0)
    alpha = scheduler.alphas_cumprod[999]
    x0 = scheduler.step(torch.zeros_like(far), scheduler.timesteps[0], far).denoised
    torch.testing.assert_close(x0, far / alpha.sqrt(), rtol=1e-3, atol=0)


def test_encoded_images_have_the_latent_shape_and_decode_with_gradient(module):
    latents = module.family.encode_images(torch.rand(2, 3, 32, 32)).requires_grad_()
    assert latents.shape == (2, *module.family.latent_shape(32, 32))
    module.family.decode(latents).mean().backward()
    assert latents.grad.abs().sum() > 0
    with pytest.raises(UserError, match="30x32 is not a multiple of"):
        module.family.latent_shape(30, 32)


def test_latents_are_normalized_by_the_autoencoders_statistics_as_in_the_pipeline(saved, noise):
    family = SDXLFamily(str(saved))
    family.load()
    plain = family.encode_images(torch.zeros(1, 3, 32, 32))
    mean, std = [0.5, -1.0, 1.5, 0.2], [2.0, 3.0, 1.5, 2.5]
    family.loaded.vae.register_to_config(latents_mean=mean, latents_std=std)
    latents, images = (
        family.loaded(
            TEXTS, num_inference_steps=1, guidance_scale=1.0, latents=noise.clone(), **{**CALL, "output_type": kind}
        ).images
        for kind in ("latent", "pt")
    )
    torch.testing.assert_close(family.decode(latents), images, atol=1e-5, rtol=0)
    scale = family.loaded.vae.config.scaling_factor
    mean, std = (torch.tensor(each).view(1, 4, 1, 1) for each in (mean, std))
    encoded = family.encode_images(torch.zeros(1, 3, 32, 32))
    torch.testing.assert_close(encoded * std / scale + mean, plain / scale, atol=1e-5, rtol=1e-5)


def test_family_refuses_a_pipeline_of_another_family(saved, tiny_pipeline):
    with pytest.raises(UserError, match="holds a StableDiffusion3Pipeline, not a StableDiffusionXLPipeline"):
        SDXLFamily(str(tiny_pipeline))
    with pytest.raises(UserError, match="holds a StableDiffusionXLPipeline, not a StableDiffusion3Pipeline"):
        tiny.family(saved)


def sketch_with(saved, place, scheduler):
    """Sketch a pipeline that has this scheduler."""
    path = place / "pipeline"
    shutil.copytree(saved, path)
    scheduler.save_pretrained(path / "scheduler")
    index = path / "model_index.json"
    kind = ["diffusers", type(scheduler).__name__]
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": kind}))
    family = SDXLFamily(str(path))
    family.sketch()
    return family


def test_a_schedule_without_signal_at_its_end_has_the_levels_of_the_exported_one(saved, tmp_path):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", rescale_betas_zero_snr=True,
        prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    assert scheduler.alphas_cumprod[-1] == 0
    family = sketch_with(saved, tmp_path, scheduler)
    shape = family.latent_shape(32, 32)
    sigmas = family.few_step_sigmas(4, shape)
    assert family.timestep(sigmas[:-1]).tolist() == [999, 749, 499, 249]
    exported = family.to_pipeline(family.loaded.unet, 4, shape, stochastic=False).scheduler
    exported.set_timesteps(4)
    torch.testing.assert_close(exported.sigmas / (1 + exported.sigmas), sigmas, atol=1e-6, rtol=0)


def test_a_network_with_continuous_times_is_refused(saved, tmp_path):
    from diffusers import EulerDiscreteScheduler

    continuous = EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(UserError, match=r"family\.path: the network's times are continuous"):
        sketch_with(saved, tmp_path, continuous)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EDMEulerScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True}),
    ],
)
def test_a_schedule_that_is_not_variance_preserving_is_refused(saved, tmp_path, name, settings):
    import diffusers

    with pytest.raises(UserError, match=rf"family\.path: the schedule of {name} is not variance-preserving"):
        sketch_with(saved, tmp_path, getattr(diffusers, name)(**settings))


def test_a_network_that_takes_the_guidance_scale_is_refused(saved, tmp_path):
    path = tmp_path / "pipeline"
    shutil.copytree(saved, path)
    config = path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "time_cond_proj_dim": 16}))
    with pytest.raises(
        UserError, match=r"family\.path: .* takes the guidance scale as an input \(time_cond_proj_dim\)"
    ):
        SDXLFamily(str(path)).sketch()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["DMD", "GDMD"])
def test_command_line_trains_resumes_and_exports_for_diffusers(method, saved, fast_fit, tmp_path, noise):
    from diffusers import StableDiffusionXLPipeline

    from gdmd_lightning.cli import main

    overlay = tmp_path / "sdxl.yaml"
    family = f"{{class_path: SDXLFamily, init_args: {{path: {saved}}}}}"
    matching = "{renoise_distribution: {class_path: UniformTimestep}}"
    overlay.write_text(f"model: {{init_args: {{family: {family}, matching: {matching}}}}}\n")
    config = [*fast_fit, *(["--config", "shapes_dmd.yaml"] if method == "DMD" else []), "--config", str(overlay)]
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    plain = ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=true"]
    main(["fit", *config, *plain, "--trainer.max_steps=2"])
    main(["fit", *config, *plain, "--trainer.max_steps=3", f"--ckpt_path={last}"])
    module = load_module(str(last), trust=["tiny"])
    assert type(module).__name__ == method
    pipe = StableDiffusionXLPipeline.from_pretrained(export(module, tmp_path / "out"), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(TEXTS, num_inference_steps=4, guidance_scale=1.0, latents=noise.clone(), **CALL).images
    torch.testing.assert_close(module.generate(noise, TEXTS), theirs, atol=1e-4, rtol=0)
