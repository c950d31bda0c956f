"""Gradient flow through roles, and the effect of guidance, adapter scale and micro-batches."""

import pytest
import tiny
import torch

from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.roles import LoRA


@pytest.fixture(params=["copies", "adapters"])
def roles(request, tiny_pipeline):
    family = tiny.family(tiny_pipeline)
    lora = LoRA(rank=2, alpha=2) if request.param == "adapters" else None
    module = DMD(family, height=16, width=32, lora=lora)
    module.configure_model()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for role in ("generator", "fake_score", "ema"):
            for parameter in module.roles.parameters_of(role):
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=rng))
    return module.roles


@pytest.fixture
def latents(roles):
    x = torch.randn(3, *roles.family.latent_shape(16, 32), generator=torch.Generator().manual_seed(1))
    conditioning = roles.family.encode(["a red circle", "a blue square", "two green stars"])
    return NoisyLatents(x, torch.tensor([0.3, 0.6, 0.9]), conditioning)


def test_through_lets_gradient_reach_the_input(roles, latents):
    x = latents.x.clone().requires_grad_()
    roles.velocity("fake_score", NoisyLatents(x, latents.sigma, latents.conditioning), through=True).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_through_leaves_frozen_weights_without_gradient(roles, latents):
    x = latents.x.clone().requires_grad_()
    with roles.learning("generator"):
        noisy = NoisyLatents(x, latents.sigma, latents.conditioning)
        roles.velocity("fake_score", noisy, through=True).sum().backward()
    assert all(parameter.grad is None for parameter in roles.parameters_of("fake_score"))
    assert all(parameter.requires_grad for parameter in roles.parameters_of("fake_score"))


@pytest.mark.parametrize("role", ["teacher", "fake_score", "ema"])
def test_velocity_of_a_frozen_role_without_through_has_no_gradient(roles, latents, role):
    x = latents.x.clone().requires_grad_()
    with roles.learning("generator"):
        assert not roles.velocity(role, NoisyLatents(x, latents.sigma, latents.conditioning)).requires_grad


def test_velocity_of_the_learning_role_passes_gradient_to_its_weights_only(roles, latents):
    with roles.learning("generator"):
        roles.velocity("generator", latents).square().sum().backward()
    assert any(parameter.grad is not None for parameter in roles.parameters_of("generator"))
    assert all(parameter.grad is None for parameter in roles.parameters_of("fake_score"))


def test_velocity_uses_the_roles_own_weights(roles, latents):
    velocities = [roles.velocity(role, latents) for role in ("teacher", "generator", "fake_score", "ema")]
    for k, one in enumerate(velocities):
        assert all(not torch.allclose(one, other) for other in velocities[:k])


def test_guidance_extrapolates_from_the_empty_prompt(roles, latents):
    unconditional = NoisyLatents(latents.x, latents.sigma, roles.family.empty.expand(3))
    u, c = roles.velocity("teacher", unconditional), roles.velocity("teacher", latents)
    guided = roles.velocity("teacher", latents, guidance_scale=2.5)
    torch.testing.assert_close(guided, u + 2.5 * (c - u), rtol=1e-4, atol=1e-4)


def test_x0_forwards_every_option(roles, latents):
    x = latents.x.clone().requires_grad_()
    noisy = NoisyLatents(x, latents.sigma, latents.conditioning)
    x0 = roles.x0("teacher", noisy, guidance_scale=2.5, through=True)
    v = roles.velocity("teacher", noisy, guidance_scale=2.5, through=True)
    torch.testing.assert_close(x0, x - latents.sigma.view(-1, 1, 1, 1) * v)
    assert v.requires_grad


@pytest.mark.parametrize("roles", ["adapters"], indirect=True)
def test_adapter_scale_0_is_the_teacher_and_1_the_role(roles, latents):
    teacher, whole = roles.velocity("teacher", latents), roles.velocity("fake_score", latents)
    torch.testing.assert_close(roles.velocity("fake_score", latents, adapter_scale=0.0), teacher)
    half = roles.velocity("fake_score", latents, adapter_scale=0.5)
    assert not torch.allclose(half, teacher)
    assert not torch.allclose(half, whole)
    torch.testing.assert_close(roles.x0("fake_score", latents, adapter_scale=0.0), latents.x0(teacher))
    torch.testing.assert_close(roles.velocity("fake_score", latents), whole)


def test_micro_batches_give_the_velocity_of_the_whole_batch(roles, latents):
    whole = roles.velocity("fake_score", latents, guidance_scale=2.0)
    roles.micro_batch_size = 2
    torch.testing.assert_close(roles.velocity("fake_score", latents, guidance_scale=2.0), whole, rtol=1e-5, atol=1e-5)


def test_evaluations_count_guided_ones_twice(roles, latents):
    roles.evaluations.clear()
    roles.velocity("teacher", latents, guidance_scale=2.0)
    roles.velocity("fake_score", latents)
    assert roles.evaluations == {"teacher": 6, "fake_score": 3}
