"""Latents and images that are not square."""

import pytest
import tiny
import torch

from gdmd_lightning.families.sdxl import SDXLFamily


@pytest.fixture(scope="module")
def sd3(tiny_pipeline):
    family = tiny.family(tiny_pipeline)
    family.network = family.load()
    return family


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    family = SDXLFamily(str(tiny.save_sdxl(tmp_path_factory.mktemp("sdxl") / "pipeline")))
    family.network = family.load()
    return family


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_latents_and_images_keep_height_before_width(name, request):
    family = request.getfixturevalue(name)
    channels, height, width = family.latent_shape(16, 32)
    assert 2 * height == width
    assert family.decode(torch.zeros(1, channels, height, width)).shape == (1, 3, 16, 32)
    assert family.encode_images(torch.zeros(1, 3, 16, 32)).shape == (1, channels, height, width)


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_velocity_has_the_shape_of_its_latents(name, request):
    family = request.getfixturevalue(name)
    x = torch.zeros(1, *family.latent_shape(16, 32))
    v = family.predict_velocity(family.network, x, torch.tensor([0.5]), family.encode(["a red circle"]))
    assert v.shape == x.shape


def test_sdxl_passes_height_before_width_to_its_network(sdxl):
    passed = []
    hook = sdxl.network.register_forward_pre_hook(
        lambda _, __, options: passed.append(options["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    x = torch.zeros(2, *sdxl.latent_shape(16, 32))
    sdxl.predict_velocity(sdxl.network, x, torch.tensor([0.5, 0.5]), sdxl.encode(["a red circle", "a dog"]))
    hook.remove()
    assert passed[0].tolist() == [[16, 32, 0, 0, 16, 32]] * 2
