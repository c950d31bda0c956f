"""Sizes of pictures that a pipeline cannot make are refused before its weights are loaded."""

import json
import shutil

import pytest
import tiny

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.resolution import Grid
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily


def refused(check, *size: int) -> str:
    with pytest.raises(UserError) as error:
        check(*size)
    return str(error.value)


def test_grid_allows_multiples_of_a_patch_up_to_its_positions():
    grid = Grid(autoencoder=8, patch=2, most=4)
    for size in ((16, 16), (64, 16), (16, 64)):
        grid.check(*size)
    for size in ((24, 16), (16, 24), (0, 16), (16, 0)):
        expected = f"{size[0]}x{size[1]} is not a multiple of 16 pixels; use a multiple of 16: autoencoder 8, patch 2"
        assert refused(grid.check, *size) == f"resolution: {expected}"
    for size in ((80, 16), (16, 80)):
        expected = f"resolution: {size[0]}x{size[1]} needs more positions than the network has; "
        assert refused(grid.check, *size) == f"{expected}use at most 64 pixels on a side: 4 patches of 16"
    Grid(autoencoder=8).check(8, 80000)


@pytest.mark.parametrize(
    ("family", "path", "allowed", "wrong"),
    [
        (SD3Family, "stabilityai/stable-diffusion-3-medium-diffusers", (3072, 512), [(3088, 512), (1000, 1000)]),
        (SD3Family, "stabilityai/stable-diffusion-3.5-medium", (6144, 512), [(512, 6160), (520, 520)]),
        (SDXLFamily, "stabilityai/stable-diffusion-xl-base-1.0", (1032, 8192), [(1024, 1020)]),
        (Flux2KleinFamily, "black-forest-labs/FLUX.2-klein-base-4B", (8192, 528), [(520, 512)]),
    ],
)
def test_published_models_refuse_sizes_from_their_shipped_configurations(family, path, allowed, wrong):
    family(path).check_resolution(*allowed)
    for size in wrong:
        assert refused(family(path).check_resolution, *size).startswith(f"resolution: {size[0]}x{size[1]} ")


@pytest.mark.parametrize("size", [(40, 32), (32, 64)])
def test_a_module_refuses_a_size_before_loading_weights(tiny_pipeline, tmp_path, size, monkeypatch):
    # Only the configurations are there.
    for config in (tiny_pipeline / "transformer", tiny_pipeline / "vae"):
        shutil.copytree(config, tmp_path / config.name, ignore=shutil.ignore_patterns("*.safetensors"))
    module = tiny.module(tiny_pipeline)
    module.family.path = str(tmp_path)
    module.height, module.width = size
    line = refused(module.configure_model)
    assert line.startswith(f"resolution: {size[0]}x{size[1]} needs more positions than the network has; ")


def test_latent_shape_refuses_the_same_sizes(tiny_pipeline):
    family = tiny.family(tiny_pipeline)
    family.load()
    for size in ((64, 32), (30, 32)):
        assert refused(family.latent_shape, *size) == refused(family.check_resolution, *size)


def test_a_broken_configuration_is_left_to_the_loader(tmp_path, tiny_pipeline):
    family = tiny.family(tiny_pipeline)
    family.path = str(tmp_path)
    family.check_resolution(33, 33)
    for part in ("transformer", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps({}))
    family.check_resolution(33, 33)
