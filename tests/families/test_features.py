"""Features for a discriminator: their shape, their gradient, and no effect on the network."""

import pytest
import tiny
import torch

from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sdxl import SDXLFamily

TEXTS = ["a red circle", "two blue squares"]
# Tokens and width for 8x8 latents: SD3 has 2x2 patches, SDXL halves the sides once before its middle block.
SHAPES = {"sd3": (16, 32), "sdxl": (16, 32), "flux2": (64, 32)}


@pytest.fixture(scope="module", params=SHAPES)
def parts(request, tmp_path_factory):
    """Family, network and the arguments of a call with two samples."""
    path = tmp_path_factory.mktemp("features") / "pipeline"
    match request.param:
        case "sd3":
            family = tiny.family(tiny.save_pipeline(path, layers=3))
        case "sdxl":
            family = SDXLFamily(str(tiny.save_sdxl(path)))
        case _:
            family = Flux2KleinFamily(str(tiny.save_flux2(path)), max_sequence_length=16, text_layers=(1, 2))
    network = family.load()
    noise = torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    arguments = noise, torch.tensor([0.3, 0.8]), family.encode(TEXTS)
    return request.param, family, network, arguments


def test_features_are_one_vector_per_image_token(parts):
    name, family, network, arguments = parts
    assert family.features(network, *arguments).shape == (2, *SHAPES[name])


def test_features_are_the_image_stream_that_enters_the_next_layer(parts):
    name, family, network, arguments = parts
    layer = {"sd3": "transformer_blocks.2", "sdxl": "up_blocks.0", "flux2": "norm_out"}[name]
    entered = []
    hook = network.get_submodule(layer).register_forward_pre_hook(
        lambda _, args, kwargs: entered.append(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]),
        with_kwargs=True,
    )
    features = family.features(network, *arguments)
    hook.remove()
    expected = entered[0].flatten(2).transpose(1, 2) if name == "sdxl" else entered[0]
    assert torch.equal(features, expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_features_pass_gradient_to_the_latents_through_frozen_weights(parts, checkpointing):
    _, family, network, (x, sigma, conditioning) = parts
    x = x.clone().requires_grad_()
    if checkpointing:
        network.enable_gradient_checkpointing()
    family.features(network, x, sigma, conditioning).square().mean().backward()
    if checkpointing:
        network.disable_gradient_checkpointing()
    assert x.grad.isfinite().all()
    assert (x.grad.flatten(1).abs().sum(1) > 0).all()
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_features_keep_the_dtype_of_the_latents(parts):
    _, family, network, (x, sigma, conditioning) = parts
    assert family.features(network, x.double(), sigma, conditioning).dtype == torch.float64


def test_features_do_not_change_the_network(parts):
    _, family, network, arguments = parts
    before = family.predict_velocity(network, *arguments)
    family.features(network, *arguments)
    assert torch.equal(family.predict_velocity(network, *arguments), before)
    assert not any(module._forward_hooks for module in network.modules())


def test_features_leave_no_hook_after_an_error(parts):
    _, family, network, (x, sigma, conditioning) = parts
    with pytest.raises(RuntimeError):
        family.features(network, x[:, :1], sigma, conditioning)
    assert not any(module._forward_hooks for module in network.modules())
