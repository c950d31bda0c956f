"""Roles whose blocks are compiled are those that are not, for all families, also where they share one network."""

import pytest
import tiny
import torch
from torch import nn
from torch._dynamo import utils

from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.roles import AdapterRoles, CopiedRoles, LoRA, Optimization, Roles, RoleSpec

SPECS = (
    RoleSpec("generator", optimizer=Optimization()),
    RoleSpec("fake_score", optimizer=Optimization()),
    RoleSpec("ema", average_of="generator", decay=0.9),
)
NAMES = ("teacher", "generator", "fake_score", "ema")


@pytest.fixture(scope="module", params=["sd3", "sdxl", "flux2"])
def family(request, tmp_path_factory) -> ModelFamily:
    path = tmp_path_factory.mktemp(request.param) / "pipeline"
    match request.param:
        case "sd3":
            return tiny.family(tiny.save_pipeline(path, layers=2))
        case "sdxl":
            return SDXLFamily(str(tiny.save_sdxl(path)))
        case _:
            return Flux2KleinFamily(str(tiny.save_flux2(path)), max_sequence_length=16, text_layers=(1, 2))


@pytest.fixture
def graphs(monkeypatch):
    """How many graphs are compiled, by a backend that needs no compiler of C++."""
    original = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **given: original(self, backend="eager", **given))
    torch._dynamo.reset()
    utils.counters.clear()
    yield lambda: utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def cast(family: ModelFamily, *, adapters: bool) -> Roles:
    """Roles with random weights, all different."""
    network = family.load()
    roles = AdapterRoles(family, network, SPECS, lora=LoRA(2, 4)) if adapters else CopiedRoles(family, network, SPECS)
    stream = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in roles.named_parameters():
            if not roles.is_frozen(name):
                parameter += torch.randn(parameter.shape, generator=stream) / 8
    return roles


@pytest.mark.slow
@pytest.mark.parametrize("adapters", [False, True], ids=["copies", "lora"])
def test_compiled_roles_equal_those_that_are_not(family, graphs, adapters):
    roles = cast(family, adapters=adapters)
    shape = family.latent_shape(32, 32)
    stream = torch.Generator().manual_seed(2)
    x, sigma = torch.randn(2, *shape, generator=stream), torch.tensor([0.3, 0.8])
    latents = NoisyLatents(x, sigma, family.encode(["a red circle", "two blue squares"]))

    def velocities() -> list[torch.Tensor]:
        found = [roles.velocity(role, latents).detach() for role in NAMES]
        with torch.autocast("cpu", torch.bfloat16):
            found.append(roles.velocity("generator", latents).detach())
        if adapters:  # as DMDR's cold start
            found += [roles.velocity("fake_score", latents, adapter_scale=s).detach() for s in SCALES]
        with roles.learning("generator"):
            v = roles.velocity("generator", latents)
            v.square().mean().backward()
        found += [p.grad.clone() for p in roles.parameters_of("generator") if p.grad is not None]
        for parameter in roles.parameters():
            parameter.grad = None
        return found

    plain = velocities()
    assert all(not torch.allclose(plain[i], plain[j]) for i in range(4) for j in range(i))
    roles.compile_blocks(frozen=False)
    fast = velocities()
    compiled = graphs()
    assert compiled > 0
    for one, other in zip(plain, fast, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    velocities()
    assert graphs() == compiled
    if adapters:
        for number in range(20):
            roles.velocity("fake_score", latents, adapter_scale=0.5 + number / 100)
        assert graphs() <= compiled + 2


SCALES = (0.25, 0.5, 0.75)
