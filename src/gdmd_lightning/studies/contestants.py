"""Generators to be compared: a teacher at several settings, and few-step students."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gdmd_lightning.callbacks.pictures import picture_grid
from gdmd_lightning.configuration.restore import build_module
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.files import atomic_file
from gdmd_lightning.locations import resolve
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.metrics.evaluation import Generate, shown
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.studies.tasks import Task

TEACHER_STEPS = 30


@dataclass(frozen=True)
class Contestant:
    """Something that generates pictures.

    Args:
        name: Its name in tables.
        evaluations: Network evaluations per picture.
        latent_shape: Shape of one latent, ``(C, H, W)``.
        generate: Makes pictures from noise on any device and texts.
        encode: The teacher's autoencoder: pictures to latents.
        reference: The guided teacher, whose distribution the generator should have.
        teacher: Digest of the teacher's weights, with its steps and guidance.
    """

    name: str
    evaluations: int
    latent_shape: tuple[int, ...]
    generate: Generate
    encode: Callable[[torch.Tensor], torch.Tensor]
    reference: Generate
    teacher: str


def teachers(module: DistillationModule, steps: int = TEACHER_STEPS, guidance: float | None = None) -> list[Contestant]:
    """The teacher at ``steps`` with guidance, then at the student's steps with and without guidance.

    Args:
        module: A module with its roles loaded.
        steps: Steps of the teacher as it is normally used.
        guidance: Guidance scale; None for the scale that the module is distilled with.
    """
    scale = module.teacher_guidance if guidance is None else guidance
    few = module.steps

    def teacher(name: str, count: int, scale: float) -> Contestant:
        passes = 1 if scale == 1 else module.family.guided_passes
        calls = len(module.family.teacher_scheduler(count, module.latent_shape).timesteps)
        return _contestant(name, passes * calls, module, _teacher(module, count, scale))

    return [
        teacher(f"teacher, {steps} steps, guided", steps, scale),
        teacher(f"teacher, {few} steps, guided", few, scale),
        teacher(f"teacher, {few} steps", few, 1.0),
    ]


def student(name: str, module: DistillationModule) -> Contestant:
    """The averaged generator of a module."""

    def generate(noise: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return module.generate(noise.to(module.device), texts)

    return _contestant(name, module.steps, module, generate)


def _contestant(name: str, evaluations: int, module: DistillationModule, generate: Generate) -> Contestant:
    scale = module.teacher_guidance
    return Contestant(
        name,
        evaluations,
        module.latent_shape,
        generate,
        module.family.encode_images,
        _teacher(module, TEACHER_STEPS, scale),
        f"{module.teacher_digest} {TEACHER_STEPS} {scale}",
    )


def _teacher(module: DistillationModule, steps: int, scale: float) -> Generate:
    def generate(noise: torch.Tensor, texts: list[str]) -> torch.Tensor:
        return module.generate_teacher(noise.to(module.device), texts, steps, scale)

    return generate


def bare_teacher(task: Task, path: str | None = None, device: str = "cpu") -> DistillationModule:
    """A module with the task's teacher and an untrained student.

    Args:
        task: The task whose configuration describes the module.
        path: Pipeline directory of another teacher of the same family.
        device: Where the module is placed.
    """
    place = resolve(path or task.teacher)
    settings = parse(["--config", task.config, f"--model.family.init_args.path={place}"], "evaluate")
    module = build_module(settings.model)
    module.configure_model()
    module.to(torch.device(device)).eval()
    module.family.to(module.device)
    return module


@torch.no_grad()
def draw(contestants: Sequence[Contestant], prompts: Sequence[Prompt], out: Path, columns: int = 9) -> None:
    """Save a picture grid: one row per contestant, one column per prompt and its noise."""
    texts, noise = shown(prompts, columns, contestants[0].latent_shape, 0)
    figure = picture_grid({c.name.replace(", ", "\n"): c.generate(noise, texts) for c in contestants}, texts)
    with atomic_file(out) as part:
        figure.savefig(part, format="png")
