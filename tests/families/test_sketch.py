"""A sketch has the shapes of the loaded pipeline without its weights."""

import shutil
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.families.sketch import sketch_model
from gdmd_lightning.geneval.classes import CLASSES


def count_parameters(part: nn.Module) -> int:
    return sum(parameter.numel() for parameter in part.parameters())


@pytest.fixture(scope="module", params=["sd3", "sdxl", "flux2"])
def families(request, tmp_path_factory):
    """A loaded family, and one sketched from the same directory after its weights were deleted."""
    path = tmp_path_factory.mktemp("sketch") / "pipeline"
    match request.param:
        case "sd3":
            tiny.save_pipeline(path)
            pair = [SD3Family(str(path), 5, dtype="bfloat16") for _ in range(2)]
        case "sdxl":
            tiny.save_sdxl(path)
            pair = [SDXLFamily(str(path), "bfloat16") for _ in range(2)]
        case _:
            tiny.save_flux2(path)
            pair = [Flux2KleinFamily(str(path), 24, (1, 3), "bfloat16") for _ in range(2)]
    pair[0].load()
    for weights in path.rglob("*.safetensors"):
        weights.unlink()
    pair[1].sketch()
    return pair


def test_sketch_has_the_names_shapes_and_dtypes_of_the_loaded_pipeline(families):
    loaded, sketched = (
        {
            (name, key): (tuple(tensor.shape), tensor.dtype)
            for name, part in family.loaded.components.items()
            if isinstance(part, nn.Module)
            for key, tensor in part.state_dict().items()
        }
        for family in families
    )
    assert sketched == loaded


def test_sketch_is_frozen_on_the_meta_device(families):
    parts = [part for part in families[1].loaded.components.values() if isinstance(part, nn.Module)]
    assert all(t.is_meta for part in parts for t in (*part.parameters(), *part.buffers()))
    assert not any(p.requires_grad for part in parts for p in part.parameters())


def test_blank_conditioning_has_the_shape_of_an_encoded_prompt(families):
    encoded = families[0].encode(["a red circle"])
    blank = families[1].blank_conditioning(torch.device("meta"))
    for name in ("sequence", "pooled", "ids"):
        real, shape = getattr(encoded, name), getattr(blank, name)
        assert (real is None) == (shape is None)
        if real is not None:
            assert (real.shape, real.dtype) == (shape.shape, shape.dtype)


@pytest.mark.parametrize(
    ("family", "path", "counts"),
    [
        (
            SD3Family,
            "stabilityai/stable-diffusion-3-medium-diffusers",
            {
                "transformer": 2_028_328_000,
                "vae": 83_819_683,
                "text_encoder": 123_650_304,
                "text_encoder_2": 694_659_840,
                "text_encoder_3": 4_762_310_656,
            },
        ),
        (SD3Family, "stabilityai/stable-diffusion-3.5-medium", {"transformer": 2_243_171_520}),
        (
            SDXLFamily,
            "stabilityai/stable-diffusion-xl-base-1.0",
            {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
        ),
        (
            Flux2KleinFamily,
            "black-forest-labs/FLUX.2-klein-base-4B",
            {"transformer": 3_875_544_576, "vae": 84_046_115, "text_encoder": 4_022_468_096},
        ),
    ],
)
def test_shipped_architecture_has_the_published_number_of_parameters(family, path, counts):
    sketched = family(path)
    sketched.sketch()
    assert {name: count_parameters(sketched.loaded.components[name]) for name in counts} == counts


def test_shipped_clip_has_the_published_number_of_parameters():
    from transformers import CLIPModel

    assert count_parameters(sketch_model(CLIPModel, "openai/clip-vit-large-patch14")) == 427_616_513


def test_shipped_detector_has_the_published_number_of_parameters():
    from transformers import Mask2FormerForUniversalSegmentation

    detector: Any = sketch_model(Mask2FormerForUniversalSegmentation, "facebook/mask2former-swin-small-coco-instance")
    assert detector.config.num_labels == len(CLASSES)
    assert count_parameters(detector) == 68_741_083


def test_sketch_reports_a_broken_configuration(tiny_pipeline, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, broken)
    (broken / "transformer" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"family\.path: the configuration of .* cannot be used"):
        SD3Family(str(broken)).sketch()
