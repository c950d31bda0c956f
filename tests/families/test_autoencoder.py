"""Autoencoders that overflow float16 decode and encode in float32, with gradient; others keep their dtype."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily

FAMILIES = {
    "sd3": (tiny.save_pipeline, lambda path, dtype: SD3Family(str(path), max_sequence_length=0, dtype=dtype)),
    "sdxl": (tiny.save_sdxl, lambda path, dtype: SDXLFamily(str(path), dtype=dtype)),
    "flux2": (tiny.save_flux2, lambda path, dtype: Flux2KleinFamily(str(path), 8, (1, 2), dtype)),
}


def prepare(pipeline: Path, *, upcast: bool) -> None:
    """Give the autoencoder activations of 1e6 or so, and the config that says so."""
    config = pipeline / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "force_upcast": upcast}))
    file = pipeline / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("decoder.conv_in.weight", "encoder.conv_in.weight"):
        weights[name] = (weights[name] * 3e5).clamp(-6e4, 6e4)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.fixture(scope="module", params=FAMILIES)
def overflowing(request, tmp_path_factory):
    """Makes families on a pipeline whose autoencoder overflows float16."""
    save, make = FAMILIES[request.param]
    path = save(tmp_path_factory.mktemp(request.param) / "pipeline")
    prepare(path, upcast=True)

    def loaded(dtype: str):
        family = make(path, dtype)
        family.load()
        return family

    return loaded


def latents_of(family) -> torch.Tensor:
    return torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))


def test_decoding_in_float16_is_finite_and_near_float32(overflowing):
    half, full = overflowing("float16"), overflowing("float32")
    latents = latents_of(full)
    images = half.decode(latents)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, full.decode(latents), atol=0.02, rtol=0)
    assert half.loaded.text_encoder.dtype == torch.float16


def test_gradient_passes_through_the_decoder(overflowing):
    family = overflowing("float16")
    latents = latents_of(family).requires_grad_()
    family.decode(latents).square().mean().backward()
    assert latents.grad.isfinite().all()
    assert latents.grad.abs().max() > 0


def test_encoding_in_float16_is_finite_and_near_float32(overflowing):
    half, full = overflowing("float16"), overflowing("float32")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = full.encode_images(images)
    torch.testing.assert_close(half.encode_images(images), expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_autocast_to_float16_does_not_reach_the_autoencoder(overflowing, dtype):
    family = overflowing(dtype)
    latents, images = latents_of(family), torch.rand(1, 3, 32, 32)
    decoded, encoded = family.decode(latents), family.encode_images(images)
    with torch.autocast("cpu", torch.float16):
        assert torch.equal(family.decode(latents), decoded)
        assert torch.equal(family.encode_images(images), encoded)


def test_bfloat16_keeps_its_dtype_and_its_range(overflowing):
    family = overflowing("bfloat16")
    assert family.loaded.vae.dtype == torch.bfloat16
    assert family.decode(latents_of(family)).isfinite().all()


def test_a_pipeline_for_export_has_the_autoencoder_in_its_own_dtype(overflowing):
    family = overflowing("float16")
    network = getattr(family.loaded, family.network_component)
    pipeline = family.to_pipeline(network, 2, family.latent_shape(32, 32), stochastic=False)
    assert pipeline.vae.dtype == torch.float16
    assert family.loaded.vae.dtype == torch.float32
    assert family.decode(latents_of(family)).isfinite().all()


def test_a_sketch_counts_the_autoencoder_as_it_is_loaded(overflowing):
    family = overflowing("float16")
    family.sketch()
    assert family.loaded.vae.dtype == torch.float32


def test_an_autoencoder_that_does_not_overflow_stays_in_float16(tmp_path):
    path = tiny.save_sdxl(tmp_path / "pipeline")
    prepare(path, upcast=False)
    family = SDXLFamily(str(path), dtype="float16")
    family.load()
    assert family.loaded.vae.dtype == torch.float16
    # This one does overflow, so the test above would notice if nothing were done.
    assert not family.decode(latents_of(family)).isfinite().all()


@pytest.mark.parametrize("name", ["sd3", "sdxl"])
def test_a_tiny_autoencoder_encodes_and_decodes(name, tmp_path):
    from diffusers import AutoencoderTiny

    save, make = FAMILIES[name]
    path = save(tmp_path / "pipeline")
    index = path / "model_index.json"
    vae = ["diffusers", "AutoencoderTiny"]
    index.write_text(json.dumps({**json.loads(index.read_text()), "vae": vae}))
    blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
    widths = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
    shutil.rmtree(path / "vae")
    AutoencoderTiny(**blocks, **widths).save_pretrained(path / "vae")
    family = make(path, "float32")
    family.load()
    images = torch.rand(2, 3, 32, 32)
    latents = family.encode_images(images)
    assert torch.equal(latents, family.loaded.vae.encode(images * 2 - 1).latents)
    assert latents.shape == (2, *family.latent_shape(32, 32))
    assert family.decode(latents).shape == images.shape
