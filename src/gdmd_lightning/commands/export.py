"""Write a checkpoint's generator for diffusers: a few-step pipeline directory, or a LoRA file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser

from gdmd_lightning.configuration.loading import add_loading_options
from gdmd_lightning.configuration.messages import parsed


def main(arguments: list[str]) -> int:
    """``export CHECKPOINT OUT``."""
    parser = ArgumentParser(prog="gdmd_lightning export", description=__doc__, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("checkpoint", type=str, help="a .ckpt written by fit")
    parser.add_argument("out", type=Path, help="directory to write; must not exist")
    parser.add_argument("--averaged", type=bool, default=True, help="export the averaged (EMA) weights")
    parser.add_argument(
        "--form",
        type=Literal["pipeline", "lora"],
        default="pipeline",
        help="a whole pipeline, or the adapter of a LoRA run",
    )
    add_loading_options(parser)
    options = parsed(parser, arguments)

    from gdmd_lightning.configuration.restore import load_module
    from gdmd_lightning.studies.export import export, snippet

    role = "ema" if options.averaged else "generator"
    module = load_module(options.checkpoint, role=role, teacher=options.teacher, trust=options.trust)
    export(module, options.out, averaged=options.averaged, form=options.form)
    print(f"import diffusers\n{snippet(module, options.out, options.form)}")
    return 0
