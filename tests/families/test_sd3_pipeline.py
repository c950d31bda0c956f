"""Sampling SD3 equals diffusers' own pipeline, and exported pipelines reproduce our images."""

import json
import shutil

import pytest
import tiny
import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.loading import check_pipeline
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.studies.contestants import teachers

TEXTS = ["a red circle", "two blue squares left of a green triangle"]


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def module(tiny_pipeline):
    module = tiny.module(tiny_pipeline, DMD)
    module.configure_model()
    return module


def compare_with_pipeline(module, noise, steps, guidance_scale):
    ours = module.generate_teacher(noise, TEXTS, steps, guidance_scale)
    theirs = module.family.loaded(
        TEXTS,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=noise.clone(),
        max_sequence_length=0,
        output_type="pt",
    ).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("steps", "guidance_scale"), [(4, 3.0), (7, 1.0)])
def test_teacher_reproduces_its_pipeline(module, noise, steps, guidance_scale):
    compare_with_pipeline(module, noise, steps, guidance_scale)


@pytest.fixture(scope="module", params=["dynamic shift", "our own export"])
def shifted_by_size(request, module, tmp_path_factory):
    """A module whose teacher's scheduler computes its shift when the pipeline is called."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    if request.param == "our own export":
        pipeline = module.family.to_pipeline(module.roles.generator, 4, module.latent_shape, stochastic=False)
    else:
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4)
        pipeline = type(module.family.loaded)(**module.family.components(scheduler=scheduler))
    path = tmp_path_factory.mktemp("dynamic") / "pipeline"
    pipeline.save_pretrained(path)
    shifted = tiny.module(path, DMD)
    shifted.configure_model()
    return shifted


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 16)])
def test_teacher_with_a_shift_by_size_reproduces_its_pipeline(shifted_by_size, height, width):
    family = shifted_by_size.family
    shape = family.latent_shape(height, width)
    family.loaded(
        TEXTS, num_inference_steps=4, guidance_scale=1.0, height=height, width=width, max_sequence_length=0,
        output_type="latent",
    )  # fmt: skip
    torch.testing.assert_close(
        family.teacher_scheduler(4, shape).sigmas, family.loaded.scheduler.sigmas, rtol=0, atol=0
    )


def test_teacher_with_a_shift_by_size_draws_its_pipelines_pictures(shifted_by_size, noise):
    compare_with_pipeline(shifted_by_size, noise, 4, 3.0)


@pytest.mark.parametrize("length", [0, 5])
def test_encode_equals_the_pipelines_embeddings(tiny_pipeline, length):
    family = SD3Family(str(tiny_pipeline), max_sequence_length=length)
    family.load()
    conditioning = family.encode(TEXTS)
    sequence, _, pooled, _ = family.loaded.encode_prompt(
        TEXTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
    )
    assert torch.equal(conditioning.sequence, sequence)
    assert torch.equal(conditioning.pooled, pooled)
    assert conditioning.sequence.shape[1] == 12 + length


def test_guidance_in_one_pass_equals_two_passes(module, noise):
    family, network = module.family, module.roles.teacher
    sigma, conditioning = torch.tensor([0.3, 0.8]), family.encode(TEXTS)
    with torch.no_grad():
        guided = family.predict_velocity(network, noise, sigma, conditioning, 3.0)
        c = family.velocity(network, noise, sigma, conditioning)
        u = family.velocity(network, noise, sigma, family.encode(["", ""]))
    torch.testing.assert_close(guided, u + 3 * (c - u), atol=1e-5, rtol=0)


@pytest.fixture(scope="module", params=[1.0, 2.0, 3.0])
def shifted(request, tmp_path_factory):
    path = tiny.save_pipeline(tmp_path_factory.mktemp("shifted") / "pipeline", shift=request.param)
    family = tiny.family(path)
    return family, family.load()


def test_exported_scheduler_visits_the_generators_sigmas(shifted):
    family, network = shifted
    shape = family.latent_shape(32, 32)
    for steps in range(1, 9):
        pipeline = family.to_pipeline(network, steps, shape, stochastic=False)
        pipeline.set_progress_bar_config(disable=True)
        pipeline(
            "a red circle",
            num_inference_steps=steps,
            guidance_scale=1.0,
            max_sequence_length=0,
            height=32,
            width=32,
            output_type="latent",
        )
        torch.testing.assert_close(
            pipeline.scheduler.sigmas.float(),
            family.few_step_sigmas(steps, shape),
            atol=1e-6,
            rtol=0,
            msg=f"{steps} steps",
        )


@pytest.mark.parametrize("key", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_exported_scheduler_visits_the_generators_sigmas_whatever_the_teachers_spacing(tiny_pipeline, key):
    from diffusers import FlowMatchEulerDiscreteScheduler

    family = tiny.family(tiny_pipeline)
    network = family.load()
    config = family.loaded.scheduler.config
    family.loaded.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=3.0, **{key: True})
    shape = family.latent_shape(32, 32)
    scheduler = family.to_pipeline(network, 4, shape, stochastic=False).scheduler
    scheduler.set_timesteps(4, mu=scheduler.config.max_shift)
    torch.testing.assert_close(scheduler.sigmas, family.few_step_sigmas(4, shape), atol=1e-6, rtol=0)


def test_few_step_sigmas_without_shift_are_those_of_dmd2(shifted):
    family, _ = shifted
    if family.loaded.scheduler.config.shift == 1:
        assert family.few_step_sigmas(4, family.latent_shape(32, 32)).tolist() == [1, 0.75, 0.5, 0.25, 0]


def test_decode_gives_images_with_gradient(module, noise):
    latents = noise.clone().requires_grad_()
    images = module.family.decode(latents)
    assert images.shape == (2, 3, 32, 32)
    assert images.min() >= 0
    assert images.max() <= 1
    images.mean().backward()
    assert latents.grad.abs().sum() > 0


def test_encode_images_gives_latents_of_the_networks_shape(module):
    family = module.family
    latents = family.encode_images(torch.rand(2, 3, 32, 32))
    assert latents.shape == (2, *family.latent_shape(32, 32))


def test_loaded_components_are_frozen(module):
    parts = [part for part in module.family.loaded.components.values() if isinstance(part, torch.nn.Module)]
    assert len(parts) == 4
    assert not any(p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)


def test_latent_shape_refuses_a_resolution_that_patches_do_not_divide(module):
    with pytest.raises(UserError, match="30x32 is not a multiple of"):
        module.family.latent_shape(30, 32)
    with pytest.raises(UserError, match="0x32"):
        module.family.latent_shape(0, 32)


def test_check_pipeline_checks_only_the_form_of_a_hub_id():
    check_pipeline("stabilityai/stable-diffusion-3.5-medium", "StableDiffusion3Pipeline")
    with pytest.raises(UserError, match="no directory"):
        check_pipeline("./stabilityai", "StableDiffusion3Pipeline")


def with_scheduler(pipeline, place, scheduler):
    """A copy of a pipeline that has this scheduler."""
    path = place / "pipeline"
    shutil.copytree(pipeline, path)
    scheduler.save_pretrained(path / "scheduler")
    index = path / "model_index.json"
    kind = ["diffusers", type(scheduler).__name__]
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": kind}))
    return SD3Family(str(path), max_sequence_length=0)


@pytest.mark.parametrize("way", ["load", "sketch"])
@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_a_scheduler_without_a_known_shift_is_refused(tiny_pipeline, tmp_path, name, way):
    import diffusers

    scheduler = getattr(diffusers, name)(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    with pytest.raises(UserError, match=rf"family\.path: the steps of a {name} are not known"):
        getattr(with_scheduler(tiny_pipeline, tmp_path, scheduler), way)()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"invert_sigmas": True}, r"the scheduler's levels are inverted \(invert_sigmas\)"),
        ({"num_train_timesteps": 500}, r"the scheduler has 500 timesteps \(num_train_timesteps\)"),
    ],
)
def test_a_scheduler_with_other_levels_or_times_is_refused(tiny_pipeline, tmp_path, settings, problem):
    from diffusers import FlowMatchEulerDiscreteScheduler

    family = with_scheduler(tiny_pipeline, tmp_path, FlowMatchEulerDiscreteScheduler(**settings))
    with pytest.raises(UserError, match=rf"family\.path: {problem}"):
        family.sketch()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FlowMatchHeunDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True, "shift_terminal": 0.1}),
    ],
    ids=str,
)
def test_teacher_is_sampled_with_its_pipelines_own_scheduler(tiny_pipeline, tmp_path, noise, name, settings):
    import diffusers

    module = DMD(
        with_scheduler(tiny_pipeline, tmp_path, getattr(diffusers, name)(shift=3.0, **settings)), height=32, width=32
    )
    module.configure_model()
    compare_with_pipeline(module, noise, 5, 3.0)
    evaluations = 9 if "Heun" in name else 5
    assert [each.evaluations for each in teachers(module, 5, 3.0)[:1]] == [2 * evaluations]


def test_more_text_than_the_pipeline_takes_is_refused(tiny_pipeline):
    with pytest.raises(UserError, match=r"max_sequence_length.* in \[0, 512\]"):
        SD3Family(str(tiny_pipeline), max_sequence_length=513)


def test_conditioning_keeps_rows_together():
    rows = Conditioning(torch.arange(6.0).view(3, 2, 1), torch.arange(3.0).view(3, 1))
    assert rows.repeat(2).pooled[:, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert rows.select(torch.tensor([2, 0])).sequence[:, 0, 0].tolist() == [4, 0]
    assert Conditioning.concat([rows.select(slice(0, 1)), rows.select(slice(1, 3))]).pooled.equal(rows.pooled)
    assert rows.select(slice(1, 2)).expand(4).pooled[:, 0].tolist() == [1, 1, 1, 1]
    assert rows.ids is None
