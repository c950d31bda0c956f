"""Roles as copies: who may learn, who never does, and what an evaluation costs."""

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gdmd_lightning.families.base import Conditioning, ModelFamily
from gdmd_lightning.roles import CopiedRoles, Role, Trainable

ROLES: tuple[Role, ...] = ("teacher", "fake_score", "generator", "old", "ema")
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

    def forward(self, x: Tensor, sigma: Tensor, told: Tensor) -> Tensor:
        flat = torch.cat([x.flatten(1), sigma[:, None], told], dim=1)
        return (self.linear(flat) + self.offset).view_as(x)


class TinyFamily(ModelFamily):
    """A family without a pipeline."""

    pipeline_class = "TinyPipeline"
    lora_targets = ()

    def __init__(self) -> None:
        self._empty = None
        self.batches: list[int] = []

    def load(self) -> nn.Module:
        return TinyNetwork()

    def encode(self, texts: Sequence[str]) -> Conditioning:
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

    def to_pipeline(self, network: nn.Module, steps: int, *, stochastic: bool) -> Any:
        raise NotImplementedError

    def few_step_sigmas(self, steps: int) -> Tensor:
        raise NotImplementedError

    def teacher_sigmas(self, steps: int) -> Tensor:
        raise NotImplementedError


@pytest.fixture
def roles() -> CopiedRoles:
    family = TinyFamily()
    return CopiedRoles(family, family.load(), ema_decay=0.9, old_decay=0.5, snapshots=2)


def inputs() -> tuple[Tensor, Tensor, Conditioning]:
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, *SHAPE, generator=stream)
    return x, torch.tensor([1.0, 0.5, 0.2]), TinyFamily().encode(["a", "ab", "abc"])


def network(roles: CopiedRoles, role: Role) -> nn.Module:
    return {"ema": roles.ema.module, "old": roles.old.module}.get(role) or getattr(roles, role)  # type: ignore[union-attr]


def change(module: nn.Module, by: float = 1.0) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by)


def tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(one), tensors(other), strict=True))


def test_all_roles_start_as_the_teacher(roles: CopiedRoles) -> None:
    for role in ROLES:
        assert equal(network(roles, role), roles.teacher)
    assert all(equal(snapshot, roles.teacher) for snapshot in roles.snapshots)


def test_no_two_roles_share_a_tensor(roles: CopiedRoles) -> None:
    addresses = [t.data_ptr() for role in ROLES for t in tensors(network(roles, role))]
    assert len(set(addresses)) == len(addresses)


def test_what_learns_is_float32_beside_a_teacher_of_less() -> None:
    family = TinyFamily()
    roles = CopiedRoles(family, family.load().bfloat16(), ema_decay=0.9, old_decay=0.5, snapshots=1)
    kinds = {(name.split(".")[0], p.dtype) for name, p in roles.named_parameters()}
    learners = {(name, torch.float32) for name in ("generator", "fake_score", "ema", "old", "snapshots")}
    assert kinds == learners | {("teacher", torch.bfloat16)}
    with torch.no_grad():
        for parameter in roles.parameters_of("generator"):
            parameter.mul_(1 + 1e-4)
    assert not equal(roles.generator, roles.ema.module), "an update that bfloat16 would have lost"


@pytest.mark.parametrize("learner", ["generator", "fake_score"])
def test_only_the_learning_role_gets_gradient(roles: CopiedRoles, learner: Trainable) -> None:
    x, sigma, told = inputs()
    with roles.learning(learner):
        total = sum(roles.velocity(role, x, sigma, told).square().sum() for role in ROLES)
        total = total + roles.velocity("fake_score", x, sigma, told, snapshot=1).square().sum()
        total.backward()  # type: ignore[union-attr]
    with_gradient = {name.split(".")[0] for name, p in roles.named_parameters() if p.grad is not None}
    assert with_gradient == {learner}


@pytest.mark.parametrize("role", ROLES)
def test_outside_learning_no_role_has_gradient(roles: CopiedRoles, role: Role) -> None:
    assert not roles.x0(role, *inputs()).requires_grad


def test_what_is_trained_asks_for_gradient_from_the_start_and_nothing_else_does(roles: CopiedRoles) -> None:
    """Wrappers such as DDP look once."""
    assert {name.split(".")[0] for name, p in roles.named_parameters() if p.requires_grad} == {
        "generator", "fake_score",
    }  # fmt: skip


def test_a_snapshot_of_a_learning_fake_score_passes_no_gradient(roles: CopiedRoles) -> None:
    x, sigma, told = inputs()
    with roles.learning("fake_score"):
        assert not roles.velocity("fake_score", x.requires_grad_(), sigma, told, snapshot=1).requires_grad


@pytest.mark.parametrize("role", ["teacher", "old", "ema"])
def test_roles_that_never_learn_pass_no_gradient_to_their_input(roles: CopiedRoles, role: Role) -> None:
    x, sigma, told = inputs()
    with roles.learning("generator"):
        assert not roles.velocity(role, x.requires_grad_(), sigma, told).requires_grad


def test_learning_inside_no_grad_stays_without_gradient(roles: CopiedRoles) -> None:
    with roles.learning("generator"), torch.no_grad():
        assert not roles.velocity("generator", *inputs()).requires_grad


def test_learning_ends_even_when_a_step_fails(roles: CopiedRoles) -> None:
    with pytest.raises(RuntimeError, match="step"), roles.learning("generator"):
        raise RuntimeError("a step failed")
    assert not roles.velocity("generator", *inputs()).requires_grad
    assert not any(module.training for module in roles.generator.modules())


def test_only_the_learning_role_is_in_training_mode(roles: CopiedRoles) -> None:
    with roles.learning("fake_score"):
        assert roles.fake_score.training
        assert not any(network(roles, role).training for role in ROLES if role != "fake_score")


@pytest.mark.parametrize("learner", ["generator", "fake_score"])
def test_an_optimizer_of_a_role_moves_that_role_alone(roles: CopiedRoles, learner: Trainable) -> None:
    before = copy.deepcopy(roles)
    optimizer = torch.optim.SGD(roles.parameters_of(learner), lr=0.1)
    with roles.learning(learner):
        roles.velocity(learner, *inputs()).square().sum().backward()
    optimizer.step()
    moved = {role for role in ROLES if not equal(network(roles, role), network(before, role))}
    assert moved == {learner}


@pytest.mark.parametrize("role", ROLES)
def test_a_role_answers_with_its_own_network(roles: CopiedRoles, role: Role) -> None:
    before = {other: roles.velocity(other, *inputs()) for other in ROLES}
    change(network(roles, role))
    changed = {other for other in ROLES if not torch.equal(roles.velocity(other, *inputs()), before[other])}
    assert changed == {role}


def test_x0_is_the_velocitys(roles: CopiedRoles) -> None:
    x, sigma, told = inputs()
    v = roles.velocity("generator", x, sigma, told)
    torch.testing.assert_close(roles.x0("generator", x, sigma, told), x - sigma.view(-1, 1, 1, 1) * v)


def test_evaluations_are_counted_by_role_and_latent(roles: CopiedRoles) -> None:
    x, sigma, told = inputs()
    roles.velocity("generator", x, sigma, told)
    roles.x0("generator", x[:1], sigma[:1], told.slice(0, 1))
    roles.x0("fake_score", x, sigma, told, snapshot=1)
    assert roles.evaluations == {"generator": BATCH + 1, "fake_score": BATCH}


def test_a_guided_evaluation_counts_two(roles: CopiedRoles) -> None:
    roles.x0("teacher", *inputs(), guidance_scale=3.0)
    assert roles.evaluations == {"teacher": 2 * BATCH}


def test_the_count_is_what_the_network_saw(roles: CopiedRoles) -> None:
    roles.x0("teacher", *inputs(), guidance_scale=3.0)
    roles.x0("generator", *inputs())
    assert isinstance(roles.family, TinyFamily)
    assert sum(roles.family.batches) == sum(roles.evaluations.values())


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_guidance_extrapolates_from_the_empty_prompt(roles: CopiedRoles, scale: float) -> None:
    x, sigma, told = inputs()
    conditional = roles.velocity("teacher", x, sigma, told)
    unconditional = roles.velocity("teacher", x, sigma, roles.family.empty.expand(BATCH))
    torch.testing.assert_close(
        roles.velocity("teacher", x, sigma, told, guidance_scale=scale),
        unconditional + scale * (conditional - unconditional),
    )


@pytest.mark.parametrize(("role", "decay"), [("ema", 0.9), ("old", 0.5)])
def test_an_average_moves_by_its_decay(roles: CopiedRoles, role: Role, decay: float) -> None:
    roles.after_generator_update()
    before = [t.clone() for t in tensors(network(roles, role))]
    change(roles.generator)
    roles.after_generator_update()
    for average, past, present in zip(tensors(network(roles, role)), before, tensors(roles.generator)):
        torch.testing.assert_close(average, decay * past + (1 - decay) * present)


@pytest.mark.parametrize("role", ["ema", "old"])
def test_an_averages_first_update_is_like_any_other(roles: CopiedRoles, role: Role) -> None:
    change(roles.generator)
    roles.after_generator_update()
    assert not equal(network(roles, role), roles.generator)


def test_averages_of_a_resting_generator_arrive_at_it(roles: CopiedRoles) -> None:
    change(roles.generator)
    for _ in range(200):
        roles.after_generator_update()
    for average, present in zip(tensors(roles.ema.module), tensors(roles.generator)):
        torch.testing.assert_close(average, present)


def test_averages_follow_the_generator_and_nobody_else(roles: CopiedRoles) -> None:
    change(roles.fake_score)
    roles.after_generator_update()
    assert equal(roles.ema.module, roles.teacher)


def test_a_kept_snapshot_outlives_the_fake_scores_next_updates(roles: CopiedRoles) -> None:
    change(roles.fake_score)
    then = roles.velocity("fake_score", *inputs())
    roles.keep_snapshot(1)
    change(roles.fake_score)
    assert torch.equal(roles.velocity("fake_score", *inputs(), snapshot=2), then)
    assert not torch.equal(roles.velocity("fake_score", *inputs()), then)


def test_keeping_one_snapshot_leaves_the_other(roles: CopiedRoles) -> None:
    change(roles.fake_score)
    roles.keep_snapshot(1)
    assert equal(roles.snapshots[0], roles.teacher)


def test_a_method_without_an_old_policy_is_told_so() -> None:
    family = TinyFamily()
    roles = CopiedRoles(family, family.load(), ema_decay=0.9)
    with pytest.raises(RuntimeError, match="old_decay"):
        roles.velocity("old", *inputs())


def test_averages_without_an_old_policy_still_move() -> None:
    family = TinyFamily()
    roles = CopiedRoles(family, family.load(), ema_decay=0.9)
    change(roles.generator)
    roles.after_generator_update()
    assert not equal(roles.ema.module, roles.teacher)


def test_all_state_survives_a_checkpoint(roles: CopiedRoles) -> None:
    change(roles.fake_score)
    change(roles.generator, 2.0)
    roles.keep_snapshot(0)
    roles.after_generator_update()
    family = TinyFamily()
    restored = CopiedRoles(family, family.load(), ema_decay=0.9, old_decay=0.5, snapshots=2)
    restored.load_state_dict(roles.state_dict())
    assert equal(restored, roles)
