"""What guidance alone adds to a velocity, with two passes or with the scale as an input of the network."""

import pytest
import tiny
import torch

from gdmd_lightning.families.flux2 import Flux2Family
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.roles import CopiedRoles


@pytest.mark.parametrize("name", ["two passes", "an input"])
def test_guidance_is_the_guided_velocity_minus_the_conditional_one(name, tmp_path):
    if name == "two passes":
        family = tiny.family(tiny.save_pipeline(tmp_path / "sd3"))
    else:
        path = tiny.save_flux2(tmp_path / "flux2", klein=False)
        family = Flux2Family(str(path), max_sequence_length=16, text_layers=(1, 2))
    roles = CopiedRoles(family, family.load(), ())
    noise = torch.randn(2, *family.latent_shape(32, 32), generator=torch.Generator().manual_seed(0))
    latents = NoisyLatents(noise, torch.tensor([0.3, 0.8]), family.encode(["a red circle", "two blue squares"]))
    guided, plain = (roles.x0("teacher", latents, guidance_scale=scale) for scale in (3.0, 1.0))
    before = roles.evaluations["teacher"]
    torch.testing.assert_close(roles.guidance("teacher", latents, 3.0), guided - plain, atol=1e-5, rtol=0)
    assert float((guided - plain).abs().max()) > 1e-3
    assert roles.evaluations["teacher"] - before == 4
