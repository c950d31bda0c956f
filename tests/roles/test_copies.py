"""Roles as copies: which of them get gradient, averages and snapshots, and how evaluations are counted."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Conditioning, NoisyLatents
from gdmd_lightning.roles import CopiedRoles, Optimization, RoleSpec

SPECS = (
    RoleSpec("generator", optimizer=Optimization()),
    RoleSpec("ema", average_of="generator", decay=0.9),
    RoleSpec("fake_score", optimizer=Optimization()),
    RoleSpec("old", average_of="generator", decay=0.5),
    RoleSpec("fake_score@1", snapshot_of="fake_score"),
    RoleSpec("fake_score@2", snapshot_of="fake_score"),
)
ROLES = ("teacher", "fake_score", "generator", "old", "ema", "fake_score@1", "fake_score@2")
SHAPE = (1, 2, 2)
BATCH = 3


class TinyNetwork(nn.Module):
    """One linear layer over latent, level and embedding, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        stream = torch.Generator().manual_seed(0)
        self.linear = nn.Linear(4 + 1 + 2, 4)
        self.linear.weight.data = torch.randn(4, 7, generator=stream)
        self.register_buffer("offset", torch.zeros(4))

    def forward(self, x: Tensor, sigma: Tensor, prompt: Tensor) -> Tensor:
        flat = torch.cat([x.flatten(1), sigma[:, None], prompt], dim=1)
        return (self.linear(flat) + self.offset).view_as(x)


class TinyFamily(ModelFamily):
    """A family without a pipeline."""

    pipeline_class = "TinyPipeline"
    lora_targets = ()

    def __init__(self) -> None:
        self._empty = self.pipeline = None
        self.batches: list[int] = []

    def load(self) -> nn.Module:
        return TinyNetwork()

    def feature_module(self, network: nn.Module) -> nn.Module:
        return network

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.tensor([[len(text), 1.0] for text in texts])[:, None] / 4)

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        self.batches.append(len(x_sigma))
        return network(x_sigma, sigma, conditioning.sequence[:, 0])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        raise NotImplementedError

    def decode(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def encode_images(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def to_pipeline(
        self, network: nn.Module, steps: int, latent_shape: tuple[int, int, int], *, stochastic: bool
    ) -> Any:
        raise NotImplementedError

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        raise NotImplementedError

    def teacher_scheduler(self, steps: int, latent_shape: tuple[int, int, int]) -> Any:
        raise NotImplementedError


@pytest.fixture
def roles() -> CopiedRoles:
    family = TinyFamily()
    return CopiedRoles(family, family.load(), SPECS)


def inputs() -> NoisyLatents:
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *SHAPE, generator=stream)
    return NoisyLatents(x, torch.tensor([1.0, 0.5, 0.2]), TinyFamily().encode(["a", "ab", "abc"]))


def change(module: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_copies_start_equal_to_the_teacher(roles: CopiedRoles) -> None:
    for role in ROLES:
        assert equal(roles.standalone(role), roles.standalone("teacher"))


def test_copies_share_no_tensor(roles: CopiedRoles) -> None:
    addresses = [t.data_ptr() for role in ROLES for t in tensors(roles.standalone(role))]
    assert len(set(addresses)) == len(addresses)


def test_copies_of_a_bfloat16_teacher_are_float32() -> None:
    family = TinyFamily()
    roles = CopiedRoles(family, family.load().bfloat16(), SPECS)
    kinds = {(name.split(".")[0], p.dtype) for name, p in roles.named_parameters()}
    learners = {(spec.name, torch.float32) for spec in SPECS}
    assert kinds == learners | {("teacher", torch.bfloat16)}
    with torch.no_grad():
        for parameter in roles.parameters_of("generator"):
            parameter.mul_(1 + 1e-4)
    assert not equal(roles.standalone("generator"), roles.standalone("ema")), "update lost to rounding"


@pytest.mark.parametrize("learner", ["generator", "fake_score"])
def test_learning_gives_gradient_to_its_role_only(roles: CopiedRoles, learner: str) -> None:
    with roles.learning(learner):
        total = sum(roles.velocity(role, inputs()).square().sum() for role in ROLES)
        total.backward()  # type: ignore[union-attr]
    with_gradient = {name.split(".")[0] for name, p in roles.named_parameters() if p.grad is not None}
    assert with_gradient == {learner}


@pytest.mark.parametrize("role", ROLES)
def test_x0_outside_learning_has_no_gradient(roles: CopiedRoles, role: str) -> None:
    assert not roles.x0(role, inputs()).requires_grad


def test_copies_of_trained_roles_only_require_gradient_from_the_start(roles: CopiedRoles) -> None:
    """DDP decides at the start which parameters to synchronize."""
    assert {name.split(".")[0] for name, p in roles.named_parameters() if p.requires_grad} == {
        "generator", "fake_score",
    }  # fmt: skip


def test_learning_passes_no_gradient_through_a_snapshot(roles: CopiedRoles) -> None:
    latents = inputs()
    latents.x.requires_grad_()
    with roles.learning("fake_score"):
        assert not roles.velocity("fake_score@1", latents).requires_grad


@pytest.mark.parametrize("role", ["teacher", "old", "ema"])
def test_learning_passes_no_gradient_through_untrained_roles(roles: CopiedRoles, role: str) -> None:
    latents = inputs()
    latents.x.requires_grad_()
    with roles.learning("generator"):
        assert not roles.velocity(role, latents).requires_grad


def test_learning_under_no_grad_has_no_gradient(roles: CopiedRoles) -> None:
    with roles.learning("generator"), torch.no_grad():
        assert not roles.velocity("generator", inputs()).requires_grad


def test_learning_ends_after_an_error(roles: CopiedRoles) -> None:
    with pytest.raises(RuntimeError, match="step"), roles.learning("generator"):
        raise RuntimeError("a step failed")
    assert not roles.velocity("generator", inputs()).requires_grad
    assert not any(module.training for module in roles.standalone("generator").modules())


def test_learning_puts_only_its_role_into_training_mode(roles: CopiedRoles) -> None:
    with roles.learning("fake_score"):
        assert roles.standalone("fake_score").training
        assert not any(roles.standalone(role).training for role in ROLES if role != "fake_score")


@pytest.mark.parametrize("learner", ["generator", "fake_score"])
def test_optimizer_changes_its_role_only(roles: CopiedRoles, learner: str) -> None:
    before = copy.deepcopy(roles)
    optimizer = torch.optim.SGD(roles.parameters_of(learner), lr=0.1)
    with roles.learning(learner):
        roles.velocity(learner, inputs()).square().sum().backward()
    optimizer.step()
    moved = {role for role in ROLES if not equal(roles.standalone(role), before.standalone(role))}
    assert moved == {learner}


@pytest.mark.parametrize("role", ROLES)
def test_velocity_uses_the_roles_own_network(roles: CopiedRoles, role: str) -> None:
    before = {other: roles.velocity(other, inputs()) for other in ROLES}
    change(roles.standalone(role))
    changed = {other for other in ROLES if not torch.equal(roles.velocity(other, inputs()), before[other])}
    assert changed == {role}


def test_x0_follows_from_the_velocity(roles: CopiedRoles) -> None:
    latents = inputs()
    v = roles.velocity("generator", latents)
    torch.testing.assert_close(roles.x0("generator", latents), latents.x - latents.sigma.view(-1, 1, 1, 1) * v)


def test_evaluations_are_counted_by_role_and_latent(roles: CopiedRoles) -> None:
    roles.velocity("generator", inputs())
    roles.x0("generator", inputs().select(slice(0, 1)))
    roles.x0("fake_score@1", inputs())
    assert roles.evaluations == {"generator": BATCH + 1, "fake_score@1": BATCH}


def test_evaluations_count_guided_ones_twice(roles: CopiedRoles) -> None:
    roles.x0("teacher", inputs(), guidance_scale=3.0)
    assert roles.evaluations == {"teacher": 2 * BATCH}


def test_evaluations_equal_the_rows_that_the_networks_evaluate(roles: CopiedRoles) -> None:
    roles.x0("teacher", inputs(), guidance_scale=3.0)
    roles.x0("generator", inputs())
    assert isinstance(roles.family, TinyFamily)
    assert sum(roles.family.batches) == sum(roles.evaluations.values())


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_extrapolates_from_the_empty_prompt(roles: CopiedRoles, scale: float) -> None:
    latents = inputs()
    conditional = roles.velocity("teacher", latents)
    unconditional = roles.velocity("teacher", replace(latents, conditioning=roles.family.empty.expand(BATCH)))
    torch.testing.assert_close(
        roles.velocity("teacher", latents, guidance_scale=scale),
        unconditional + scale * (conditional - unconditional),
    )


@pytest.mark.parametrize(("role", "decay"), [("ema", 0.9), ("old", 0.5)])
def test_update_averages_moves_by_the_decay(roles: CopiedRoles, role: str, decay: float) -> None:
    roles.update_averages("generator")
    before = [t.clone() for t in tensors(roles.standalone(role))]
    change(roles.standalone("generator"))
    roles.update_averages("generator")
    for average, past, present in zip(tensors(roles.standalone(role)), before, tensors(roles.standalone("generator"))):
        torch.testing.assert_close(average, decay * past + (1 - decay) * present)


@pytest.mark.parametrize("role", ["ema", "old"])
def test_update_averages_does_not_copy_at_the_first_update(roles: CopiedRoles, role: str) -> None:
    change(roles.standalone("generator"))
    roles.update_averages("generator")
    assert not equal(roles.standalone(role), roles.standalone("generator"))


def test_update_averages_converges_to_a_constant_generator(roles: CopiedRoles) -> None:
    change(roles.standalone("generator"))
    for _ in range(200):
        roles.update_averages("generator")
    for average, present in zip(tensors(roles.standalone("ema")), tensors(roles.standalone("generator"))):
        torch.testing.assert_close(average, present)


def test_update_averages_ignores_the_fake_score(roles: CopiedRoles) -> None:
    change(roles.standalone("fake_score"))
    roles.update_averages("generator")
    assert equal(roles.standalone("ema"), roles.standalone("teacher"))


def test_copy_to_a_snapshot_stays_when_the_fake_score_changes(roles: CopiedRoles) -> None:
    change(roles.standalone("fake_score"))
    then = roles.velocity("fake_score", inputs())
    roles.copy("fake_score", "fake_score@2")
    change(roles.standalone("fake_score"))
    assert torch.equal(roles.velocity("fake_score@2", inputs()), then)
    assert not torch.equal(roles.velocity("fake_score", inputs()), then)


def test_copy_to_one_snapshot_does_not_change_the_other(roles: CopiedRoles) -> None:
    change(roles.standalone("fake_score"))
    roles.copy("fake_score", "fake_score@2")
    assert equal(roles.standalone("fake_score@1"), roles.standalone("teacher"))


def test_velocity_of_an_undeclared_role_is_a_key_error() -> None:
    family = TinyFamily()
    roles = CopiedRoles(family, family.load(), SPECS[:2])
    with pytest.raises(KeyError, match="old"):
        roles.velocity("old", inputs())


def test_update_averages_works_with_fewer_roles() -> None:
    family = TinyFamily()
    roles = CopiedRoles(family, family.load(), SPECS[:2])
    change(roles.standalone("generator"))
    roles.update_averages("generator")
    assert not equal(roles.standalone("ema"), roles.standalone("teacher"))


def test_learning_refuses_an_untrained_role(roles: CopiedRoles) -> None:
    with pytest.raises(KeyError, match="trained roles are generator, fake_score"), roles.learning("ema"):
        pass


def test_update_averages_of_another_role_changes_nothing(roles: CopiedRoles) -> None:
    change(roles.standalone("generator"))
    roles.update_averages("fake_score")
    assert equal(roles.standalone("ema"), roles.standalone("teacher"))


def test_reset_followers_makes_averages_and_snapshots_equal_their_sources(roles: CopiedRoles) -> None:
    change(roles.standalone("generator"))
    change(roles.standalone("fake_score"), 2.0)
    roles.reset_followers()
    for spec in SPECS:
        if spec.source is not None:
            assert equal(roles.standalone(spec.name), roles.standalone(spec.source))


def test_optimization_of_returns_the_settings_in_the_spec() -> None:
    family, settings = TinyFamily(), Optimization(learning_rate=0.3)
    specs = (SPECS[0], RoleSpec("fake_score", optimizer=settings))
    roles = CopiedRoles(family, family.load(), specs)
    assert roles.optimization_of("fake_score") == settings != roles.optimization_of("generator")


def test_adapter_scale_of_copies_is_refused(roles: CopiedRoles) -> None:
    with pytest.raises(UserError, match=r"adapter_scale is 0\.5, but the roles are full copies"):
        roles.velocity("generator", inputs(), adapter_scale=0.5)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("ask", ["velocity", "x0", "features"])
def test_through_passes_gradient_to_the_input_and_to_no_weight(roles: CopiedRoles, role: str, ask: str) -> None:
    latents = inputs()
    latents.x.requires_grad_()
    getattr(roles, ask)(role, latents, through=True).square().sum().backward()
    assert latents.x.grad is not None
    assert latents.x.grad.abs().sum() > 0
    assert all(p.grad is None for p in roles.parameters())


def test_through_of_x0_goes_through_the_network(roles: CopiedRoles) -> None:
    latents = inputs()
    latents.x.requires_grad_()
    (found,) = torch.autograd.grad(roles.x0("ema", latents, through=True).square().sum(), latents.x)
    x0 = latents.x0(roles.velocity("ema", latents, through=True))
    (expected,) = torch.autograd.grad(x0.square().sum(), latents.x)
    assert torch.equal(found, expected)


def test_through_leaves_trained_weights_trainable(roles: CopiedRoles) -> None:
    before = [p.requires_grad for p in roles.parameters()]
    roles.velocity("fake_score", inputs(), through=True)
    assert [p.requires_grad for p in roles.parameters()] == before


def test_through_another_role_passes_gradient_to_the_learner_only(roles: CopiedRoles) -> None:
    latents = inputs()
    with roles.learning("generator"):
        x = roles.x0("generator", latents)
        roles.velocity("fake_score", replace(latents, x=x), through=True).square().sum().backward()
    assert {name.split(".")[0] for name, p in roles.named_parameters() if p.grad is not None} == {"generator"}


def test_through_under_no_grad_has_no_gradient(roles: CopiedRoles) -> None:
    latents = inputs()
    latents.x.requires_grad_()
    with torch.no_grad():
        assert not roles.velocity("teacher", latents, through=True).requires_grad


def test_features_carry_gradient_of_the_learner_alone(roles: CopiedRoles) -> None:
    with roles.learning("fake_score"):
        assert roles.features("fake_score", inputs()).requires_grad
        assert not roles.features("generator", inputs()).requires_grad


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_give_the_velocity_of_the_whole_batch(roles: CopiedRoles, size: int) -> None:
    whole = roles.velocity("generator", inputs())
    roles.micro_batch_size = size
    torch.testing.assert_close(roles.velocity("generator", inputs()), whole)
    assert isinstance(roles.family, TinyFamily)
    assert max(roles.family.batches[1:]) == min(size, BATCH)


def test_state_dict_restores_all_roles(roles: CopiedRoles) -> None:
    change(roles.standalone("fake_score"))
    change(roles.standalone("generator"), 2.0)
    roles.copy("fake_score", "fake_score@1")
    roles.update_averages("generator")
    family = TinyFamily()
    restored = CopiedRoles(family, family.load(), SPECS)
    restored.load_state_dict(roles.state_dict())
    assert equal(restored, roles)
