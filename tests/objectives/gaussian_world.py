"""A world in closed form: Gaussian data, an affine one-step student, and exact scores."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd_lightning.objectives.distribution_matching import dm_direction
from gdmd_lightning.schedules import renoise


@dataclass(frozen=True)
class Gaussian:
    """``N(mean, covariance)`` and the optimal predictions for its noised samples."""

    mean: Tensor
    covariance: Tensor

    def x0(self, x_t: Tensor, t: Tensor) -> Tensor:
        """``E[x0 | x_t] = mu + (1 - t) Sigma C_t^-1 (x_t - (1 - t) mu)``, ``C_t = (1 - t)^2 Sigma + t^2 I``."""
        t = t[:, None]
        marginal = (1 - t[..., None]) ** 2 * self.covariance + t[..., None] ** 2 * torch.eye(2, dtype=x_t.dtype)
        white = torch.linalg.solve(marginal, x_t - (1 - t) * self.mean)
        return self.mean + (1 - t) * white @ self.covariance

    def velocity(self, x_t: Tensor, t: Tensor) -> Tensor:
        """``E[eps - x0 | x_t]``, ``t`` in (0, 1]."""
        return (x_t - self.x0(x_t, t)) / t[:, None]


@dataclass
class Student:
    """``x = A z + b``, distributed as ``N(b, A A^T)``; that Gaussian is its exact fake score."""

    factor: Tensor
    shift: Tensor

    @staticmethod
    def at(factor: list[list[float]], shift: list[float]) -> "Student":
        f64 = torch.float64
        return Student(
            torch.tensor(factor, dtype=f64, requires_grad=True), torch.tensor(shift, dtype=f64, requires_grad=True)
        )

    def __call__(self, z: Tensor) -> Tensor:
        return z @ self.factor.T + self.shift

    @property
    def fake_score(self) -> Gaussian:
        factor = self.factor.detach()
        return Gaussian(self.shift.detach(), factor @ factor.T)


TEACHER = Gaussian(
    torch.tensor([1.0, -0.5], dtype=torch.float64), torch.tensor([[1.0, 0.6], [0.6, 0.8]], dtype=torch.float64)
)


def draw(batch: int, group: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The student's noise ``[B, 2]``, and levels ``[B * M]`` and noise ``[B * M, 2]`` of its targets."""
    f64 = torch.float64
    z = torch.randn(batch, 2, generator=rng, dtype=f64)
    t = 0.02 + 0.96 * torch.rand(batch * group, generator=rng, dtype=f64)
    return z, t, torch.randn(batch * group, 2, generator=rng, dtype=f64)


def predictions(teacher: Gaussian, fake_score: Gaussian, each: Tensor, t: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's ``x0`` and the implicit target ``y`` of each renoised sample ``[N, 2]``."""
    x_t = renoise(each, t, eps)
    real = teacher.x0(x_t, t)
    return real, each - dm_direction(real, fake_score.x0(x_t, t))
