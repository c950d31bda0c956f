"""Where DMD and GDMD converge, and how a reward moves the student, in a world in closed form."""

import pytest
import torch
from gaussian_world import TEACHER, Gaussian, Student, draw, predictions
from torch import Tensor

from gdmd_lightning.objectives.advantages import group_advantages
from gdmd_lightning.objectives.distribution_matching import dm_loss, normalizer
from gdmd_lightning.objectives.policy import gradient_weight, optimality

BATCH, GROUP = 128, 2
Reward = Tensor | None
"""A direction ``a`` of the linear reward ``a . y``, or none."""


def gdmd_loss(student: Student, teacher: Gaussian, draws: tuple[Tensor, Tensor, Tensor], reward: Reward) -> Tensor:
    """GDMD's first-order form on targets of a state, with an exact fake score."""
    z, t, eps = draws
    group = len(t) // len(z)
    each = student(z).repeat_interleave(group, dim=0)
    real, y = predictions(teacher, student.fake_score, each.detach(), t, eps)
    scores = torch.ones(len(y), dtype=y.dtype) if reward is None else y @ reward
    advantage = group_advantages(scores, torch.arange(len(z)).repeat_interleave(group), "batch")
    weight = gradient_weight(optimality(advantage, 2.0), 2.0)
    return dm_loss(each, y, normalizer(each, real), weight)


def dmd_loss(student: Student, teacher: Gaussian, draws: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    z, t, eps = draws
    each = student(z).repeat_interleave(len(t) // len(z), dim=0)
    real, y = predictions(teacher, student.fake_score, each.detach(), t, eps)
    return dm_loss(each, y, normalizer(each, real))


def train(weighted: bool, reward: Reward, steps: int) -> Student:
    rng = torch.Generator().manual_seed(0)
    student = Student.at([[0.4, 0.0], [0.2, 0.9]], [-1.0, 1.0])
    optimizer = torch.optim.SGD([student.factor, student.shift], lr=1.0)
    for _ in range(steps):
        draws = draw(BATCH, GROUP, rng)
        loss = gdmd_loss(student, TEACHER, draws, reward) if weighted else dmd_loss(student, TEACHER, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def assert_is_the_teacher(student: Student, tolerance: float) -> None:
    torch.testing.assert_close(student.fake_score.mean, TEACHER.mean, rtol=0, atol=tolerance)
    torch.testing.assert_close(student.fake_score.covariance, TEACHER.covariance, rtol=0, atol=tolerance)


def test_dmd_converges_to_the_teacher() -> None:
    assert_is_the_teacher(train(weighted=False, reward=None, steps=300), 0.01)


def test_gdmd_with_a_flat_reward_converges_to_the_teacher() -> None:
    assert_is_the_teacher(train(weighted=True, reward=None, steps=300), 0.01)


def test_gdmd_with_a_flat_reward_equals_dmd_to_the_bit() -> None:
    gdmd, dmd = train(weighted=True, reward=None, steps=10), train(weighted=False, reward=None, steps=10)
    assert torch.equal(gdmd.factor, dmd.factor)
    assert torch.equal(gdmd.shift, dmd.shift)


@pytest.mark.parametrize("reward", [None, [5.0, -3.0]])
def test_gdmd_has_the_teacher_as_a_fixed_point_for_any_reward(reward: list[float] | None) -> None:
    """With an exact fake score and no guidance all gradients vanish there, so weights have no effect."""
    student = Student.at(torch.linalg.cholesky(TEACHER.covariance).tolist(), TEACHER.mean.tolist())
    direction = None if reward is None else torch.tensor(reward, dtype=torch.float64)
    loss = gdmd_loss(student, TEACHER, draw(BATCH, GROUP, torch.Generator().manual_seed(0)), direction)
    for gradient in torch.autograd.grad(loss, (student.factor, student.shift)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


def test_gdmd_with_a_reward_converges_to_the_teacher() -> None:
    reward = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert_is_the_teacher(train(weighted=True, reward=reward, steps=400), 0.03)


def extra_movement(reward: Tensor, spread: str, unit_n: bool, batch: int) -> tuple[Tensor, Tensor]:
    """What the reward adds to the descent of the student's mean, and the groups' mean ``Cov(r, y)``."""
    student = Student.at([[0.8, 0.0], [0.0, 1.2]], [0.0, 0.0])
    z, t, eps = draw(batch, 4, torch.Generator().manual_seed(1))
    each = student(z).repeat_interleave(4, dim=0)
    real, y = predictions(TEACHER, student.fake_score, each.detach(), t, eps)
    n = torch.ones(len(y), dtype=y.dtype) if unit_n else normalizer(each, real)
    groups = torch.arange(batch).repeat_interleave(4)
    advantage = group_advantages(y @ reward, groups, spread)  # type: ignore[arg-type]
    weight = gradient_weight(optimality(advantage, clip=100.0), strength=1.0)
    loss = dm_loss(each, y, n, weight) - dm_loss(each, y, n)
    (gradient,) = torch.autograd.grad(loss, student.shift)
    centered = y.view(batch, 4, 2) - y.view(batch, 4, 2).mean(1, keepdim=True)
    return -gradient, torch.einsum("bmi,bmj->ij", centered, centered) / (batch * 4) @ reward


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


REWARDS = [[1.0, 0.0], [0.0, 1.0], [1.0, -2.0]]


@pytest.mark.parametrize("reward", REWARDS)
def test_gdmd_with_a_linear_reward_moves_the_mean_along_its_covariance_with_the_targets(reward: list[float]) -> None:
    a = torch.tensor(reward, dtype=torch.float64)
    movement, covariance = extra_movement(a, "none", unit_n=True, batch=200)
    # strength / clip, times the mean over the two coordinates that dm_loss takes.
    torch.testing.assert_close(movement, covariance / 100 / 2, rtol=1e-9, atol=1e-14)
    assert movement @ a > 0


@pytest.mark.parametrize("reward", REWARDS)
def test_gdmd_with_real_normalizers_still_moves_the_mean_along_the_covariance(reward: list[float]) -> None:
    a = torch.tensor(reward, dtype=torch.float64)
    movement, covariance = extra_movement(a, "batch", unit_n=False, batch=2000)
    assert movement @ a > 0
    assert cosine(movement, covariance) > 0.95


def test_gdmd_moves_the_mean_along_the_covariance_not_along_the_reward() -> None:
    a = torch.tensor([1.0, -2.0], dtype=torch.float64)
    movement, covariance = extra_movement(a, "none", unit_n=True, batch=2000)
    assert cosine(movement, covariance) > cosine(movement, a) + 0.01


def test_gdmd_with_the_opposite_reward_moves_the_mean_the_opposite_way() -> None:
    a = torch.tensor([1.0, 0.5], dtype=torch.float64)
    one, other = (extra_movement(sign * a, "batch", unit_n=False, batch=200)[0] for sign in (1, -1))
    torch.testing.assert_close(one, -other)
