"""A world in which a whole update is known in closed form: linear-Gaussian networks, linear decoding, simple rewards.

Every network is the exact denoiser of data ``N(gain * c + shift, variance I)``, where a prompt's text spells ``c``. So
its output and its gradient with respect to ``gain`` and ``shift`` are known, and an answer for a wrong prompt differs.
The formulas below are written in another form than those of the package and share no code with it.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.engines.base import Engine
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.latents import Batch, Conditioning, NoisyLatents
from gdmd_lightning.methods.base import DistillationModule, Update
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.roles import Roles

SHAPE = (2, 2, 3)
"""Of a latent; height and width differ."""
TEXTS = ("0.5 -1.0", "-1.5 0.25", "2.0 0.75", "-0.5 1.5", "1.25 -0.25")
COLORS = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]], dtype=torch.float64)
"""Of the two latent channels, ``[3, 2]``."""


class GaussianNetwork(nn.Module):
    """The velocity of data ``N(gain * c + shift, variance I)``."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.zeros(SHAPE))
        self.register_buffer("variance", torch.tensor(0.5))
        self.tap = nn.Identity()

    def forward(self, x: Tensor, sigma: Tensor, c: Tensor) -> Tensor:
        sigma = sigma.view(-1, 1, 1, 1)
        mean = self.gain * c[:, :, None, None] + self.shift
        surprise = (x - (1 - sigma) * mean) / ((1 - sigma) ** 2 * self.variance + sigma**2)
        return self.tap(sigma * surprise - (mean + (1 - sigma) * self.variance * surprise))


class GaussianFamily(ModelFamily):
    """The teacher of this world; 8 pixels per latent on each side."""

    def __init__(self) -> None:
        self.path = "gaussian"
        self.pipeline = SimpleNamespace(components={})
        self._empty = self._fingerprint = None

    def load(self) -> nn.Module:
        return GaussianNetwork()

    def _encode(self, texts: Sequence[str]) -> Conditioning:
        return Conditioning(torch.stack([meaning(text) for text in texts])[:, None])

    def velocity(self, network: nn.Module, x_sigma: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return network(x_sigma, sigma, conditioning.sequence[:, 0])

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 2, height // 8, width // 8

    def decode(self, latents: Tensor) -> Tensor:
        return torch.einsum("pc,bchw->bphw", COLORS.to(latents), latents)

    def encode_images(self, images: Tensor) -> Tensor:
        """A linear map; images of this world are as small as their latents."""
        return images[:, :2] - 0.5 * images[:, 2:]

    def feature_module(self, network: Any) -> nn.Module:
        """Features are the velocity, one token per position."""
        return network.tap

    def feature_width(self, network: nn.Module) -> int:
        return 2

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return ()

    def to_pipeline(self, network: nn.Module, steps: int, latent_shape: Any, *, stochastic: bool) -> Any:
        raise NotImplementedError

    def few_step_sigmas(self, steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        return torch.tensor([*(0.2 + 0.8 * (k / steps) for k in range(steps, 0, -1)), 0.0])

    def teacher_scheduler(self, steps: int, latent_shape: tuple[int, int, int]) -> Any:
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[k / steps for k in range(steps, 0, -1)])
        return scheduler


def meaning(text: str) -> Tensor:
    """The prompt's ``c``, ``[2]``; that of the empty prompt is not zero."""
    return torch.tensor([float(word) for word in (text or "0.3 -0.2").split()])


class Liking(Reward):
    """``10 a . pixel`` averaged, the other way round where a prompt's first number is negative."""

    name, differentiable = "liking", True

    def __init__(self, strength: float = 10.0, digits: int | None = None) -> None:
        self.strength, self.digits = strength, digits
        self.asked: list[tuple[Tensor, tuple[Prompt, ...]]] = []

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.asked.append((images.detach(), tuple(prompts)))
        score = liking(images, prompts, self.strength)
        return score if self.digits is None else score.round(decimals=self.digits)


def liking(images: Tensor, prompts: Sequence[Prompt], strength: float = 10.0) -> Tensor:
    taste = torch.tensor([1.0, 0.5, -0.25]).to(images)[:, None, None] * torch.tensor([1.0, 0.2, -0.6]).to(images)
    sign = torch.tensor([1.0 if meaning(prompt.text)[0] > 0 else -1.0 for prompt in prompts]).to(images)
    return strength * sign * (images * taste).mean((1, 2, 3))


@dataclass(frozen=True)
class Question:
    """One call of ``Roles.velocity``."""

    role: str
    x: Tensor
    sigma: Tensor
    c: Tensor
    guidance_scale: float
    learner: str | None
    gradient: bool


@dataclass
class Step:
    """One optimizer step: of whom, on which losses, with which gradient."""

    role: str
    losses: list[Tensor] = field(default_factory=list)
    gradient: dict[str, Tensor] = field(default_factory=dict)


class PlainEngine(Engine):
    """Plain gradient descent that records every step."""

    def __init__(self, roles: Roles, rate: float = 0.0) -> None:
        super().__init__(roles)
        self.rate = rate
        self.steps: list[Step] = []

    def zero_grad(self, role: str) -> None:
        self.steps.append(Step(role))
        for parameter in self.roles.parameters():
            parameter.grad = None

    def backward(self, loss: Tensor) -> None:
        self.steps[-1].losses.append(loss.detach())
        loss.backward()

    def step(self, role: str) -> bool:
        for name, parameter in self.roles.standalone(role).named_parameters():
            if parameter.grad is None:
                continue
            self.steps[-1].gradient[name] = parameter.grad.clone()
            with torch.no_grad():
                parameter -= self.rate * parameter.grad
        return True


class World:
    """A method on the Gaussian teacher, with roles that all differ and record what they are asked."""

    def __init__(self, method: type[DistillationModule], *, prompts: int = 3, each: int = 2, **options: Any) -> None:
        self.module = method(GaussianFamily(), height=16, width=24, **options)
        self.module.configure_model()
        self.roles: Any = self.module.roles
        dtype = torch.get_default_dtype()
        self.roles.to(dtype)
        for k, spec in enumerate(spec for spec in self.roles.specs if spec.head is None):
            self.set(spec.name, gain=0.6 + 0.1 * k, shift=0.3 - 0.15 * k, variance=0.35 + 0.1 * k)
        texts = [text for text in TEXTS[:prompts] for _ in range(each)]
        self.batch = self.batch_of(texts, each)
        self.asked: list[Question] = []
        self.start: dict[str, Any] = {}
        self._record()

    def batch_of(self, texts: Sequence[str], each: int) -> Batch:
        prompts = PromptBatch(tuple(Prompt(text) for text in texts), each)
        conditioning = Conditioning(torch.stack([meaning(text) for text in texts])[:, None])
        return Batch(prompts.prompts, prompts.groups, conditioning)

    @property
    def c(self) -> Tensor:
        return self.batch.conditioning.sequence[:, 0]

    def set(self, role: str, *, gain: float, shift: float, variance: float) -> None:
        """Set a role's weights; its shift differs in every element."""
        network = self.roles.standalone(role)
        self.start = {}
        with torch.no_grad():
            network.gain.fill_(gain)
            network.shift.copy_(shift * (1 + torch.arange(network.shift.numel()).view(SHAPE) / 10))
            network.variance.fill_(variance)

    def make_equal(self, source: str, *targets: str) -> None:
        self.start = {}
        for target in targets:
            self.roles.standalone(target).load_state_dict(self.roles.standalone(source).state_dict())

    def weights(self, role: str) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.roles.standalone(role).named_parameters()}

    def update(self, rate: float = 0.0) -> tuple[Update, list[Step]]:
        """One update, counted as the module counts it."""
        self.asked.clear()
        self.start = {role: copy.deepcopy(network) for role, network in self.roles.named_children()}
        engine = PlainEngine(self.roles, rate)
        done = self.module.update(self.batch, engine)
        self.module.updates += 1
        return done, engine.steps

    def questions(self, role: str, learning: bool | None = None, inside: str | None = None) -> list[Question]:
        """What a role was asked; ``learning``: with its gradient or without; ``inside``: during whose step."""
        return [
            q
            for q in self.asked
            if q.role == role
            and (learning is None or learning == (q.gradient and q.learner == role))
            and (inside is None or q.learner == inside)
        ]

    def x0(
        self, role: str, x: Tensor, sigma: Tensor, c: Tensor, guidance_scale: float = 1.0, *, now: bool = False
    ) -> Tensor:
        """A role's clean latents by Bayes' rule: precisions add up.

        The weights are those at the start of the last update, or those of ``now``.
        """
        network = self.roles.standalone(role) if now else self.start.get(role, self.roles.standalone(role))
        gain, shift, variance = network.gain.detach(), network.shift.detach(), network.variance
        empty = meaning("")
        c = empty + guidance_scale * (c - empty)
        mean = gain * c[:, :, None, None] + shift
        s = sigma.view(-1, 1, 1, 1)
        return (mean / variance + x * (1 - s) / s**2) / (1 / variance + (1 - s) ** 2 / s**2)

    def pull_back(self, role: str, sigma: Tensor, c: Tensor, d_x0: Tensor) -> dict[str, Tensor]:
        """Gradient of the role's weights from that of its ``x0``, ``[B, C, H, W]``."""
        variance = self.roles.standalone(role).variance
        share = sigma**2 / ((1 - sigma) ** 2 * variance + sigma**2)  # d x0 / d mean
        d_mean = share.view(-1, 1, 1, 1) * d_x0
        return {"gain": (d_mean * c[:, :, None, None]).sum(), "shift": d_mean.sum(0)}

    def _record(self) -> None:
        ask: Callable[..., Tensor] = self.roles.velocity

        def velocity(role: str, latents: NoisyLatents, **options: Any) -> Tensor:
            answer = ask(role, latents, **options)
            self.asked.append(
                Question(
                    role,
                    latents.x.detach().clone(),
                    latents.sigma.clone(),
                    latents.conditioning.sequence[:, 0].clone(),
                    options.get("guidance_scale", 1.0),
                    self.roles.learner,
                    answer.requires_grad,
                )
            )
            return answer

        self.roles.velocity = velocity
        self._record_guidance()

    def _record_guidance(self) -> None:
        """Questions about guidance alone are those to the role ``<role> guidance``."""
        ask: Callable[..., Tensor] = self.roles.guidance

        def guidance(role: str, latents: NoisyLatents, scale: float) -> Tensor:
            c = latents.conditioning.sequence[:, 0].clone()
            x = latents.x.detach().clone()
            self.asked.append(Question(f"{role} guidance", x, latents.sigma, c, scale, self.roles.learner, False))
            return ask(role, latents, scale)

        self.roles.guidance = guidance
        self._record_features()

    def _record_features(self) -> None:
        """Questions about features are those to the role ``<role> features``."""
        ask: Callable[..., Tensor] = self.roles.features

        def features(role: str, latents: NoisyLatents, *, through: bool = False) -> Tensor:
            answer = ask(role, latents, through=through)
            c, x = latents.conditioning.sequence[:, 0].clone(), latents.x.detach().clone()
            learner, name = self.roles.learner, f"{role} features"
            self.asked.append(Question(name, x, latents.sigma, c, 1.0, learner, answer.requires_grad))
            return answer

        self.roles.features = features


def noise_in(question: Question, x: Tensor) -> Tensor:
    """The noise with which ``x`` was renoised to what was asked about, ``[N, C, H, W]``."""
    s = question.sigma.view(-1, 1, 1, 1)
    return (question.x - (1 - s) * x) / s


def near(actual: Any, expected: Any, rtol: float = 1e-6, atol: float = 1e-8) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, check_dtype=False)


THREE = TEXTS[:3]


def three_prompts(place: Path) -> PromptDataModule:
    """The three prompts, twice each, in every batch."""
    file = place / "prompts.txt"
    file.write_text("\n".join(THREE))
    return PromptDataModule(str(file), batch_size=6, group_size=2, shuffle_buffer=0)


def module_of(method: type[DistillationModule] = DMD, **options: Any) -> DistillationModule:
    """A method on the Gaussian teacher, for a trainer, with something to learn from the start."""
    module = method(GaussianFamily(), height=16, width=24, **options)
    module.configure_model()
    with torch.no_grad():
        module.roles.standalone("generator").gain.fill_(0.4)
        if "fake_score" in module.roles.trained:
            module.roles.standalone("fake_score").gain.fill_(0.7)
    return module
