"""Closed forms of policy gradients in the world of :mod:`world`, shared by the tests of several methods."""

import math

import torch
from torch import Tensor
from world import GaussianFamily, Question, World, liking

from gdmd_lightning.samplers import CPS, SDE


def column(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def closed_step(sampler, x: Tensor, x0: Tensor, s: float, s_next: float, s_max: float):
    """Mean and standard deviation of a step, and the derivative of its mean in ``x0``."""
    if isinstance(sampler, SDE):
        g2 = sampler.noise_level**2 * s / (1 - min(s, s_max))
        dt = s_next - s
        slope = -(1 + g2 * (1 - s) / (2 * s)) * dt / s
        return x * (1 + g2 * dt / (2 * s)) + slope * (x0 - x), math.sqrt(-g2 * dt), slope
    eta = sampler.eta if isinstance(sampler, CPS) else 1.0
    kept = s_next * math.cos(eta * math.pi / 2) / s  # of the predicted noise, (x - (1 - s) x0) / s
    slope = 1 - s_next - kept * (1 - s)
    return kept * x + slope * x0, s_next * math.sin(eta * math.pi / 2), slope


def advantages_of(rewards: Tensor, each: int) -> Tensor:
    centered = (rewards.view(-1, each) - rewards.view(-1, each).mean(1, keepdim=True)).flatten()
    return centered / centered.square().mean().sqrt()


def reference_of(world: World) -> tuple[str, float]:
    """Role and guidance scale of the network from which a method's distance is; of the teacher if it has none."""
    return getattr(world.module, "reference", "teacher"), getattr(world.module, "kl_guidance_scale", 1.0)


class Rollout:
    """An update's rollouts in closed form, from what the generator was asked without gradient."""

    def __init__(self, world: World, asked: list[Question] | None = None) -> None:
        self.world, self.sigmas = world, world.module.sigmas.double()
        asked = world.questions("generator", learning=False) if asked is None else asked
        self.states = [q.x for q in asked]
        last = asked[-1]
        self.x0 = world.x0("generator", last.x, last.sigma, last.c)
        images = GaussianFamily().decode(self.x0)
        self.rewards = liking(images, world.batch.prompts)

    def step(self, k: int, role: str = "generator", guidance_scale: float = 1.0, now: bool = False):
        """Mean, std and slope of step ``k``, and where it led."""
        x, s, s_next = self.states[k], self.sigmas[k], self.sigmas[k + 1]
        x0 = self.world.x0(role, x, s.expand(len(x)), self.world.c, guidance_scale, now=now)
        sampler = self.world.module.grpo.sampler
        return *closed_step(sampler, x, x0, float(s), float(s_next), float(self.sigmas[1])), self.states[k + 1]

    def pull_back(self, k: int, d_mean: Tensor, slope: float) -> dict[str, Tensor]:
        sigma = self.sigmas[k].expand(len(d_mean))
        return self.world.pull_back("generator", sigma, self.world.c, slope * d_mean)


def check_shared_noise(rollout: Rollout, trained: list[int], each: int) -> None:
    """Samples of a prompt share the noise of the stochastic steps that are not trained, and no other."""
    for k in range(len(rollout.states) - 1):
        mean, deviation, _, led_to = rollout.step(k)
        noise = ((led_to - mean) / deviation).unflatten(0, (-1, each)).flatten(2)
        within = torch.cdist(noise, noise)[:, ~torch.eye(each, dtype=torch.bool)]
        assert bool((within < 1e-4).all()) == (k not in trained)
        assert bool((within > 0.1).all()) == (k in trained)
        assert torch.cdist(noise[0], noise[1]).min() > 0.1


def grpo_gradient(
    r: Rollout, advantages: Tensor, kl_weight: float = 0.0, steps: tuple[int, ...] = (0, 1, 2)
) -> dict[str, Tensor]:
    """Of ``-mean A log p + kl_weight KL`` at the policy that took the rollouts, averaged over the steps."""
    world, total = r.world, {"gain": torch.tensor(0.0), "shift": torch.tensor(0.0)}
    reference, scale = reference_of(world)
    for k in steps:
        mean, std, slope, led_to = r.step(k)
        size = mean.numel() * len(steps) * (std**2 if world.module.grpo.log_prob == "gaussian" else 0.5)
        d_mean = -column(advantages) * (led_to - mean) / size
        if kl_weight:
            d_mean = d_mean + kl_weight * (mean - r.step(k, reference, scale)[0]) / std**2 / mean.numel() / len(steps)
        part = r.pull_back(k, d_mean, slope)
        total = {name: total[name] + part[name] for name in part}
    return total


class JudgedByOld:
    """DiffusionNFT's samples and their optimality in closed form, from what was asked.

    The old policy is asked for its rollouts first; ``trained`` are the generator's questions at renoised samples.
    """

    def __init__(self, world: World, trained: list[Question] | None = None) -> None:
        self.world, module = world, world.module
        last = world.questions("old")[module.steps - 1]
        self.x0 = world.x0("old", last.x, last.sigma, last.c)
        self.rewards = liking(GaussianFamily().decode(self.x0), world.batch.prompts)
        self.advantages = advantages_of(self.rewards, 4)
        clip = module.nft.advantage_clip
        self.o = (self.advantages.clamp(-clip, clip) / clip + 1) / 2
        self.trained = world.questions("generator", learning=True) if trained is None else trained

    def gradient(self, kl_weight: float = 0.0) -> dict[str, Tensor]:
        """Of the loss, with the two policies written out: ``x+ = x_old + b d`` and ``x- = x_old - b d``."""
        world, settings = self.world, self.world.module.nft
        total = {"gain": torch.tensor(0.0), "shift": torch.tensor(0.0)}
        count, (reference, scale) = len(self.trained), reference_of(world)
        for q in self.trained:
            x, old = (world.x0(role, q.x, q.sigma, q.c) for role in ("generator", "old"))
            base = world.x0(reference, q.x, q.sigma, q.c, scale)
            difference = settings.beta * (x - old)
            d_x0 = torch.zeros_like(x)
            for policy, weight, sign in ((old + difference, self.o, 1.0), (old - difference, 1 - self.o, -1.0)):
                error = policy - self.x0
                size = error.abs().mean((1, 2, 3), keepdim=True)
                d_x0 += sign * 2 * column(weight) * error / size  # beta of the policy over beta of the loss
            d_x0 = settings.advantage_clip * d_x0 / x.numel() / count
            # The velocity is (x_sigma - x0) / sigma.
            d_x0 += kl_weight * 2 * (x - base) / column(q.sigma) ** 2 / x.numel() / count
            part = world.pull_back("generator", q.sigma, q.c, d_x0)
            total = {name: total[name] + part[name] for name in part}
        return total
