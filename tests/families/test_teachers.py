"""The guided teacher's x0 equals that of the pipeline's own loop, to a relative error of 1e-5 in float32."""

import pytest
import tiny
import torch

from gdmd_lightning.families.flux2 import Flux2Family, Flux2KleinFamily
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.streams import streams_of

TEXTS = ["a red circle", "two blue squares left of a green triangle"]
STEPS, GUIDANCE = 5, 4.0


@pytest.mark.parametrize("name", ["sd3", "sdxl", "flux2", "flux2, guided"])
def test_teacher_x0_equals_the_pipelines(name, tmp_path):
    match name:
        case "sd3":
            family = tiny.family(tiny.save_pipeline(tmp_path / "pipeline", layers=2, shift=3.0))
        case "sdxl":
            family = SDXLFamily(str(tiny.save_sdxl(tmp_path / "pipeline")))
        case "flux2, guided":
            path = tiny.save_flux2(tmp_path / "pipeline", klein=False)
            family = Flux2Family(str(path), max_sequence_length=512, text_layers=(1, 2))
        case _:
            path = tiny.save_flux2(tmp_path / "pipeline")
            family = Flux2KleinFamily(str(path), max_sequence_length=16, text_layers=(1, 2))
    module = DMD(family, height=32, width=32)
    module.configure_model()
    noise = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(5))
    last = []

    def keep(pipe, step, timestep, tensors):
        last.append(tensors["latents"])
        return {}

    family.loaded(
        prompt=TEXTS, num_inference_steps=STEPS, guidance_scale=GUIDANCE, latents=noise.clone(), height=32, width=32,
        output_type="pt", callback_on_step_end=keep, **family.sampling_arguments(),
    )  # fmt: skip
    with torch.no_grad():
        predict = module.predictor("teacher", family.encode(TEXTS), GUIDANCE)
        ours = family.sample_teacher(predict, noise, STEPS, streams_of(noise))
    theirs = last[-1]
    if theirs.shape != ours.shape:  # FLUX.2: a sequence of tokens
        theirs = theirs.transpose(1, 2).reshape(ours.shape)
    assert len(last) == STEPS
    torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=0)
