"""Write a generator for diffusers: a few-step pipeline directory, or a LoRA file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from gdmd_lightning.errors import UserError, WriteError
from gdmd_lightning.files import atomic_directory, write_failure
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.roles import Form


def export(module: DistillationModule, out: Path, *, averaged: bool = True, form: Form = "pipeline") -> Path:
    """Save the generator with a scheduler for its few steps and a model card.

    Args:
        module: A module with its roles loaded.
        out: Directory to write; must not exist, and appears complete or not at all.
        averaged: Export the averaged weights.
        form: ``pipeline``: the whole pipeline, for ``from_pretrained``; ``lora``: only the adapter, for
            ``load_lora_weights`` on the teacher's pipeline, and the scheduler if diffusers has one.

    Raises:
        UserError: If ``out`` exists or cannot be written, if a pipeline is requested and no diffusers scheduler
            repeats the sampler, or if an adapter is requested but full weights were trained.
    """
    if out.exists():
        raise UserError(f"{str(out)!r} exists", where="export", remedy="remove it or give another directory")
    if form == "pipeline":
        module.check_pipeline_export()
    try:
        with atomic_directory(out) as part:
            _write(module, part, "ema" if averaged else "generator", form)
            (part / "README.md").write_text(_card(module, out, averaged, form), encoding="utf-8")
    except WriteError as error:
        reason = write_failure(error.__cause__ or error)
        remedy = "free disk space or give another directory"
        raise UserError(f"cannot write {str(out)!r}: {reason}", where="export", remedy=remedy) from error
    return out


def snippet(module: DistillationModule, out: Path, form: Form = "pipeline") -> str:
    """Python lines that load an export and sample from it."""
    family, steps = module.family, module.steps
    pipeline = type(family.loaded).__name__
    absent = "".join(f", {name}={value}" for name, value in family.loading_arguments().items())
    more = "".join(f", {name}={value}" for name, value in family.sampling_arguments().items())
    path = out if form == "pipeline" else family.path
    lines = [f'pipe = diffusers.{pipeline}.from_pretrained("{path}"{absent})']
    if form == "lora":
        teacher = getattr(family.loaded, family.network_component)
        lines.append(f'pipe.load_lora_weights("{out}")')
        if why := _without_scheduler(module):
            lines.append(f"# These are not this generator's steps: {why}. Use `gdmd_lightning sample`.")
        else:
            kind = type(module.to_pipeline(teacher).scheduler).__name__
            lines.append(f'pipe.scheduler = diffusers.{kind}.from_pretrained("{out}", subfolder="scheduler")')
    # Without its size a pipeline makes pictures of its own default size, on other noise levels for some families.
    size = f"height={module.height}, width={module.width}"
    call = f'pipe(prompt="a red circle", {size}, num_inference_steps={steps}, guidance_scale=1.0{more})'
    return "\n".join([*lines, f'{call}.images[0].save("picture.png")'])


def _write(module: DistillationModule, directory: Path, role: Literal["ema", "generator"], form: Form) -> None:
    if form == "lora":
        base = module.roles.write_adapter(role, directory)
        if not _without_scheduler(module):
            module.to_pipeline(base).scheduler.save_pretrained(directory / "scheduler")
    else:
        module.to_pipeline(module.roles.standalone(role)).save_pretrained(directory, safe_serialization=True)


def _without_scheduler(module: DistillationModule) -> str:
    """Why diffusers has no scheduler for the sampler's steps; empty if it has one."""
    try:
        module.check_pipeline_export()
    except UserError as error:
        return error.what
    return ""


def _card(module: DistillationModule, out: Path, averaged: bool, form: Form) -> str:
    """The model card: teacher, method, settings, scores, and how to load the export."""
    teacher = module.family.path
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(module.provenance.scores.items()))
    facts = {
        "Teacher": f"`{Path(teacher).name if Path(teacher).exists() else teacher}`; its license applies",
        "License of the teacher": _license(Path(teacher)),
        "Method": type(module).__name__,
        "Reward": _reward_name(module),
        "Prompts": module.provenance.prompts or "not recorded",
        "Generator updates": str(module.provenance.updates),
        "Weights": f"{'averaged' if averaged else 'last'}, {'adapters' if module.lora else 'full fine-tuning'}",
        "Sampler": f"{type(module.sampler).__name__}, {module.steps} steps, no guidance",
        "Resolution": f"{module.height}x{module.width}",
    }
    if form == "lora" and (why := _without_scheduler(module)):
        facts["Scheduler"] = f"none: {why}"
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    measured = f"\nScores of the averaged generator at its last evaluation:\n\n| score | value |\n|---|---|\n{scores}\n"
    return (
        f"# A {module.steps}-step generator\n\n| | |\n|---|---|\n{rows}\n"
        f"{measured if scores else ''}\n```python\nimport diffusers\n{snippet(module, Path(out.name), form)}\n```\n"
    )


def _reward_name(module: DistillationModule) -> str:
    return "none" if module.judge is None else module.judge.reward.name


def _license(teacher: Path) -> str:
    """The license named in the teacher's model card."""
    card = teacher / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^license(?:_name)?:\s*(\S+)", text, re.MULTILINE)
    return found[1] if found else "see its model card"
