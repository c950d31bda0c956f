"""Write a checkpoint's generator as a diffusers pipeline directory that samples in its few steps as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

from jsonargparse import ArgumentParser

from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule


def export(module: DistillationModule, out: Path, *, averaged: bool = True) -> Path:
    """Save generator, encoders, autoencoder and a scheduler set for the sampler's levels.

    Args:
        module: With its roles loaded.
        out: Directory; must not exist, and appears only when whole.
        averaged: Take the averaged weights.

    Raises:
        UserError: If ``out`` exists, or the sampler is one that diffusers' scheduler cannot repeat.
    """
    if out.exists():
        raise UserError(f"{str(out)!r} exists", where="export", remedy="remove it or give another directory")
    if module.sampler.kind == "cps":
        raise UserError("diffusers has no scheduler for cps", where="sampler.kind", remedy="use ode or renoise")
    network = module.networks.ema.module if averaged else module.networks.generator
    pipeline = module.family.to_pipeline(network, module.sampler.steps, stochastic=module.sampler.kind == "renoise")
    fresh = out.with_name(out.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    pipeline.save_pretrained(fresh, safe_serialization=True)
    (fresh / "README.md").write_text(_card(module, out), encoding="utf-8")
    fresh.rename(out)
    return out


def snippet(module: DistillationModule, out: Path) -> str:
    """Two lines that load the exported pipeline and sample."""
    pipeline = type(module.family.loaded).__name__
    absent = "".join(f", {name}={value}" for name, value in module.family.loading_arguments().items())
    more = "".join(f", {name}={value}" for name, value in module.family.sampling_arguments().items())
    call = f'pipe(prompt="a red circle", num_inference_steps={module.sampler.steps}, guidance_scale=1.0{more})'
    return f'pipe = diffusers.{pipeline}.from_pretrained("{out}"{absent})\n{call}.images[0].save("picture.png")'


def _card(module: DistillationModule, out: Path) -> str:
    return (
        f"# A {module.sampler.steps}-step generator\n\n"
        f"Method: {type(module).__name__}. Teacher: {Path(module.family.path).name}, whose licence applies. "
        f"Sampler: {module.sampler.kind}.\n\n"
        f"```python\nimport diffusers\n{snippet(module, Path(out.name))}\n```\n"
    )


def main(arguments: list[str]) -> int:
    """``export CHECKPOINT OUT``."""
    parser = ArgumentParser(prog="gdmd_lightning export", description=__doc__, exit_on_error=False)
    parser.add_argument("checkpoint", type=str, help="a .ckpt that fit has written")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--averaged", type=bool, default=True, help="take the averaged (EMA) weights")
    options = parser.parse_args(arguments)
    module = load_module(options.checkpoint)
    export(module, options.out, averaged=options.averaged)
    print(f"import diffusers\n{snippet(module, options.out)}")
    return 0
