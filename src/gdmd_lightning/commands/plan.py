"""What training a configuration needs per GPU, before anything is downloaded, and what to turn if that is too much.

Parameters are counted, and an update followed, without weights; see :mod:`gdmd_lightning.commands.footprint`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gdmd_lightning.commands.footprint import Component, Plan, plan
from gdmd_lightning.configuration.restore import build_module
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.errors import UserError

GIB = 2**30
SPARE = GIB
"""Assumed for what torch's allocator does not hand out: the CUDA context, workspaces of cuBLAS and cuDNN, gaps."""

SWITCHES = (
    ("--model.memory.gradient_checkpointing=true",),
    ("--model.lora.rank=32",),
    ("--model.family.init_args.dtype=bfloat16",),
    ("--trainer.precision=bf16-mixed",),
    ("--model.memory.vae_slicing=true",),
    ("--model.memory.vae_tiling=true",),
    ("--model.memory.reward=cpu",),
    ("--model.embedding_cache.directory=embeddings",),
    ("--model.generator.algorithm=adamw_8bit", "--model.critic.algorithm=adamw_8bit"),
)
"""What can be turned; of no use are those that are on already."""


@dataclass(frozen=True)
class Saving:
    """What an argument would save.

    Args:
        arguments: To be added.
        total: Bytes that would be needed then.
    """

    arguments: tuple[str, ...]
    total: int


def plan_of(arguments: Sequence[str]) -> Plan:
    """The plan of ``fit`` with these arguments, the reserve included.

    Raises:
        UserError: If they are wrong, or name what cannot be planned.
    """
    settings = parse(arguments, "plan")
    strategy = str(settings.trainer.strategy)
    if strategy != "auto" and not strategy.startswith(("ddp", "single")):
        raise UserError(f"{strategy!r} is not planned yet", where="trainer.strategy", remedy="plan it with ddp")
    found = plan(
        build_module(settings.model),
        settings.data.batch_size,
        settings.data.group_size,
        settings.trainer.precision,
        accelerator="cpu" if settings.trainer.accelerator == "cpu" else "cuda",
    )
    more = [Component("context, workspaces, gaps (assumed)", (), 0, SPARE)]
    if strategy.startswith("ddp") or _several(settings.trainer.devices):
        more.insert(0, _buckets(found))
    return replace(found, components=(*found.components, *more))


def _several(devices: Any) -> bool:
    return len(devices) > 1 if isinstance(devices, list) else str(devices).isdigit() and int(devices) > 1


def _buckets(found: Plan) -> Component:
    """DDP's own copies of all gradients, in which they are averaged."""
    gradients = [c for c in found.components if c.name.endswith("gradients")]
    numbers, size = sum(c.numbers for c in gradients), sum(c.size for c in gradients)
    return Component("ddp: buckets of gradients", ("float32",), numbers, size)


def savings(arguments: Sequence[str], now: int) -> list[Saving]:
    """What each switch that is not on yet would save, the best first."""
    found = [*_tried(arguments, now)]
    return sorted((saving for saving in found if saving.total < now), key=lambda saving: saving.total)


def _tried(arguments: Sequence[str], now: int) -> Iterator[Saving]:
    settings = parse(arguments, "plan")
    size, group = settings.data.batch_size, settings.data.group_size
    smaller = max(size // 2 // group, 1) * group
    for switch in (*SWITCHES, (f"--data.batch_size={smaller}",)):
        try:
            if parse([*arguments, *switch], "plan") != settings:
                yield Saving(switch, plan_of([*arguments, *switch]).total)
        except UserError:
            continue  # it has no place in this configuration


def table(found: Plan) -> str:
    """The plan in lines, in GiB and billions of numbers."""
    head = f"{'':<36}{'precision':<20}{'numbers':>10}{'GiB':>9}"
    rows = [
        f"{c.name:<36}{', '.join(c.dtypes):<20}{_short(c.numbers):>10}{c.size / GIB:>9.2f}" for c in found.components
    ]
    rows.append(f"{'all the time':<66}{found.resident / GIB:>9.2f}")
    rows += ["", f"{'beside it, at most, in an update':<66}{'GiB':>9}"]
    rows += [f"{name:<66}{size / GIB:>9.2f}" for name, size in found.phases.items()]
    return "\n".join([head, *rows, "", f"{'in all, at most':<66}{found.total / GIB:>9.2f}"])


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count) if count else ""


def main(arguments: list[str]) -> int:
    """``plan``; what it does not know are arguments of ``fit``."""
    parser = argparse.ArgumentParser(
        prog="gdmd_lightning plan",
        description=__doc__,
        epilog="All other arguments are those of fit: --config shapes.yaml --model.memory.vae_slicing=true ...",
        allow_abbrev=False,
    )
    parser.add_argument("--gpu_memory", type=float, default=24.0, metavar="GIB", help="of one GPU (24)")
    options, rest = parser.parse_known_args(arguments)
    if not rest:
        raise UserError("there is no configuration to plan", remedy="plan --config shapes.yaml")
    found = plan_of(rest)
    print(table(found))
    left = options.gpu_memory - found.total / GIB
    if left >= 0:
        print(f"\nfits in {options.gpu_memory:g} GiB: yes, with {left:.2f} GiB to spare")
        return 0
    print(
        f"\nfits in {options.gpu_memory:g} GiB: no, {-left:.2f} GiB are missing. Each of these alone would save:",
        flush=True,
    )
    for saving in savings(rest, found.total):
        print(f"{(found.total - saving.total) / GIB:>9.2f} GiB  {' '.join(saving.arguments)}")
    return 0
