"""Write a checkpoint's generator for diffusers: a pipeline directory that samples in its few steps, or a LoRA file."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from torch import nn

from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import Pipeline
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.roles import AdapterRoles

Form = Literal["pipeline", "lora"]


def export(module: DistillationModule, out: Path, *, averaged: bool = True, form: Form = "pipeline") -> Path:
    """Save the generator with a scheduler set for the sampler's levels and a model card.

    Args:
        module: With its roles loaded.
        out: Directory; must not exist, and appears only when whole.
        averaged: Take the averaged weights.
        form: ``pipeline``: everything, to be loaded by ``from_pretrained``; ``lora``: the adapter alone, to be loaded
            onto the teacher's pipeline by ``load_lora_weights``.

    Raises:
        UserError: If ``out`` exists or cannot be written, the sampler is one that diffusers' schedulers cannot
            repeat, or an adapter is asked for where full weights were trained.
    """
    if out.exists():
        raise UserError(f"{str(out)!r} exists", where="export", remedy="remove it or give another directory")
    if module.sampler.kind == "cps":
        raise UserError("diffusers has no scheduler for cps", where="sampler.kind", remedy="use ode or renoise")
    if form == "lora" and not isinstance(module.networks, AdapterRoles):
        raise UserError("its full weights were trained, not an adapter", where="export", remedy="use --form pipeline")
    fresh = out.with_name(out.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fresh.mkdir(parents=True)
        _write(module, fresh, "ema" if averaged else "generator", form)
        (fresh / "README.md").write_text(_card(module, out, averaged, form), encoding="utf-8")
        fresh.rename(out)
    except Exception as error:
        shutil.rmtree(fresh, ignore_errors=True)
        if isinstance(error, OSError) or type(error).__name__ == "SafetensorError":  # a full disk, as either tells it
            raise UserError(
                f"cannot write {str(out)!r}: {error}", where="export", remedy="see that there is room"
            ) from error
        raise
    return out


def _write(module: DistillationModule, place: Path, role: Literal["ema", "generator"], form: Form) -> None:
    roles = module.networks
    if form == "lora":
        assert isinstance(roles, AdapterRoles)
        module.family.save_lora(place, *roles.lora_of(role))
        _pipeline(module, roles.network).scheduler.save_pretrained(place / "scheduler")
    else:
        _pipeline(module, roles.standing_alone(role)).save_pretrained(place, safe_serialization=True)


def _pipeline(module: DistillationModule, network: nn.Module) -> Pipeline:
    return module.family.to_pipeline(network, module.sampler.steps, stochastic=module.sampler.kind == "renoise")


def snippet(module: DistillationModule, out: Path, form: Form = "pipeline") -> str:
    """Lines that load what was exported and sample."""
    family, steps = module.family, module.sampler.steps
    pipeline = type(family.loaded).__name__
    absent = "".join(f", {name}={value}" for name, value in family.loading_arguments().items())
    more = "".join(f", {name}={value}" for name, value in family.sampling_arguments().items())
    path = out if form == "pipeline" else family.path
    lines = [f'pipe = diffusers.{pipeline}.from_pretrained("{path}"{absent})']
    if form == "lora":
        assert isinstance(module.networks, AdapterRoles)
        scheduler = type(_pipeline(module, module.networks.network).scheduler)
        lines += [
            f'pipe.load_lora_weights("{out}")',
            f'pipe.scheduler = diffusers.{scheduler.__name__}.from_pretrained("{out}", subfolder="scheduler")',
        ]
    call = f'pipe(prompt="a red circle", num_inference_steps={steps}, guidance_scale=1.0{more})'
    return "\n".join([*lines, f'{call}.images[0].save("picture.png")'])


def _card(module: DistillationModule, out: Path, averaged: bool, form: Form) -> str:
    """The model card: what this is, of what, how it was made and what it scored."""
    teacher = module.family.path
    reward: Any = getattr(module, "reward", None)
    scores = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(module.provenance.scores.items()))
    facts = {
        "Teacher": f"`{Path(teacher).name if Path(teacher).exists() else teacher}`, whose licence applies",
        "Licence of the teacher": _licence(Path(teacher)),
        "Method": type(module).__name__,
        "Reward": "none" if reward is None else reward.name,
        "Prompts": module.provenance.prompts or "not recorded",
        "Generator updates": str(module.provenance.updates),
        "Weights": f"{'averaged' if averaged else 'last'}, {'adapters' if module.lora else 'full fine-tuning'}",
        "Sampler": f"{module.sampler.kind}, {module.sampler.steps} steps, no guidance",
        "Resolution": f"{module.height}x{module.width}",
    }
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    measured = f"\nScores of the averaged generator at its last evaluation:\n\n| score | value |\n|---|---|\n{scores}\n"
    return (
        f"# A {module.sampler.steps}-step generator\n\n| | |\n|---|---|\n{rows}\n"
        f"{measured if scores else ''}\n```python\nimport diffusers\n{snippet(module, Path(out.name), form)}\n```\n"
    )


def _licence(teacher: Path) -> str:
    """What the teacher's own card says."""
    card = teacher / "README.md"
    said = re.search(r"^license(?:_name)?:\s*(\S+)", card.read_text("utf-8"), re.MULTILINE) if card.is_file() else None
    return said[1] if said else "see its card"


def main(arguments: list[str]) -> int:
    """``export CHECKPOINT OUT``."""
    parser = ArgumentParser(prog="gdmd_lightning export", description=__doc__, exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="a .ckpt that fit has written")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--averaged", type=bool, default=True, help="take the averaged (EMA) weights")
    parser.add_argument("--form", type=Form, default="pipeline", help="a whole pipeline, or the adapter of a LoRA run")
    options = parser.parse_args(arguments)
    module = load_module(options.checkpoint)
    export(module, options.out, averaged=options.averaged, form=options.form)
    print(f"import diffusers\n{snippet(module, options.out, options.form)}")
    return 0
