"""Implicit targets: where the distillation gradient wants to take a student sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gdmd_lightning.families.base import Conditioning
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.objectives.distribution_matching import dm_direction, normaliser
from gdmd_lightning.roles import Roles
from gdmd_lightning.samplers import draw_noise
from gdmd_lightning.schedules import renoise


@dataclass(frozen=True)
class Targets:
    """Implicit targets of a batch of student samples, ``M`` a sample.

    Args:
        y: ``x - (fake - real)``, ``[B, M, C, H, W]``.
        level: Renoise level of each, ``[B, M]``.
        snapshot: Which fake score, ``[M]``; 0 is the present one.
        n: Normaliser, ``[B, M]``.
    """

    y: Tensor
    level: Tensor
    snapshot: Tensor
    n: Tensor


@torch.no_grad()
def implicit_targets(
    roles: Roles,
    x: Tensor,
    conditioning: Conditioning,
    level: Tensor,
    snapshot: Tensor,
    matching: Matching,
    generator: torch.Generator,
) -> Targets:
    """``y = x - (fake - real)``: one teacher pass and one pass a fake score for all targets of all samples.

    Args:
        roles: Teacher and fake score.
        x: Student samples, ``[B, C, H, W]``.
        conditioning: Of the samples, ``B`` rows.
        level: Renoise levels, ``[B, M]``.
        snapshot: Which fake score each of the ``M`` asks, ``[M]``.
        matching: Guidance and the normaliser's floor.
        generator: Random stream of the renoising.

    Source: GDMD (2604.19009), section 3; un-normalised, so that it is a picture.
    """
    batch, group = level.shape
    repeated = x.repeat_interleave(group, dim=0)
    sigma = level.reshape(-1).to(x)
    many = conditioning.repeat(group)
    x_t = renoise(repeated, sigma, draw_noise(tuple(repeated.shape), generator, x.device))
    real = roles.x0("teacher", x_t, sigma, many, matching.guidance_scale)
    fake = torch.empty_like(real)
    which = snapshot.repeat(batch)
    for s in snapshot.unique().tolist():
        rows = torch.nonzero(which == s)[:, 0].to(x.device)
        fake[rows] = roles.x0("fake_score", x_t[rows], sigma[rows], many.select(rows), snapshot=s).to(fake.dtype)
    y = repeated - dm_direction(real, fake)
    n = normaliser(repeated, real, matching.floor)
    return Targets(y.unflatten(0, (batch, group)), level.to(x), snapshot, n.unflatten(0, (batch, group)))
