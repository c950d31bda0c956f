"""The plan of a configuration of ``fit``, what each memory option would save, and both as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gdmd_lightning.configuration.restore import build_module
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.errors import UserError
from gdmd_lightning.planning.footprint import Component, Plan, plan

GIB = 2**30
SPARE = GIB
"""Assumed for what torch's allocator does not hand out: CUDA context, workspaces of cuBLAS and cuDNN, gaps."""

SWITCHES = (
    ("--model.memory.gradient_checkpointing=true",),
    ("--model.lora.rank=32",),
    ("--model.family.init_args.dtype=bfloat16",),
    ("--trainer.precision=bf16-mixed",),
    ("--model.memory.vae_slicing=true",),
    ("--model.memory.vae_tiling=true",),
    ("--model.memory.reward=cpu",),
    ("--model.embedding_cache.directory=embeddings",),
    ("--model.generator.algorithm=adamw_8bit", "--model.fake_score.algorithm=adamw_8bit"),
)
"""Options that can save memory; those already in effect are not tried."""


@dataclass(frozen=True)
class Saving:
    """What further arguments would save.

    Args:
        arguments: Arguments to add.
        total: Bytes needed with them.
    """

    arguments: tuple[str, ...]
    total: int


def plan_of(arguments: Sequence[str]) -> Plan:
    """The plan of ``fit`` with these arguments, including the reserve.

    Raises:
        UserError: If the arguments are wrong, or name something that cannot be planned.
    """
    settings = parse(arguments, "plan")
    strategy = str(settings.trainer.strategy)
    if strategy != "auto" and not strategy.startswith(("ddp", "single")):
        raise UserError(f"{strategy!r} is not planned yet", where="trainer.strategy", remedy="plan it with ddp")
    module = build_module(settings.model)
    module.check_batch(settings.data.batch_size, settings.data.group_size)
    found = plan(
        module,
        settings.data.batch_size,
        settings.trainer.precision,
        accelerator="cpu" if settings.trainer.accelerator == "cpu" else "cuda",
    )
    more = [Component("context, workspaces, gaps (assumed)", (), 0, SPARE)]
    if strategy.startswith("ddp") or _several(settings.trainer.devices):
        more.insert(0, _buckets(found))
    return replace(found, components=(*found.components, *more))


def batch_line(arguments: Sequence[str]) -> str:
    """The batch of an update in words: samples, groups, and micro-batches if there are any."""
    settings = parse(arguments, "plan")
    model, batch, group = settings.model.init_args, settings.data.batch_size, settings.data.group_size
    size = batch * model.accumulate
    micro = model.micro_batch_size if model.accumulate == 1 else min(batch, model.micro_batch_size or batch)
    at_once = "all at once" if micro is None or micro >= size else f"in micro-batches of {micro}"
    return f"{size} samples per update on each GPU, {group} per prompt, {at_once}"


def savings(arguments: Sequence[str], now: int, limit: int) -> list[Saving]:
    """What each option that is not in effect yet would save, the largest saving first.

    Args:
        arguments: As for ``fit``.
        now: Bytes needed without any of them.
        limit: Bytes of the GPU, for the size of micro-batches.
    """
    found = [*_options(arguments), *_micro_batches(arguments, limit)]
    return sorted((saving for saving in found if saving.total < now), key=lambda saving: saving.total)


def _options(arguments: Sequence[str]) -> Iterator[Saving]:
    settings = parse(arguments, "plan")
    size, group = settings.data.batch_size, settings.data.group_size
    smaller = max(size // 2 // group, 1) * group
    for switch in (*SWITCHES, (f"--data.batch_size={smaller}",)):
        try:
            if parse([*arguments, *switch], "plan") != settings:
                yield Saving(switch, plan_of([*arguments, *switch]).total)
        except UserError:
            continue  # this configuration does not take the option


def _micro_batches(arguments: Sequence[str], limit: int) -> Iterator[Saving]:
    """The largest micro-batch, by halving, with which the plan fits; else the smallest."""
    settings = parse(arguments, "plan")
    micro = settings.model.init_args.micro_batch_size or settings.data.batch_size
    best: Saving | None = None
    while micro > 1 and (best is None or best.total > limit):
        micro //= 2
        switch = (f"--model.micro_batch_size={micro}",)
        best = Saving(switch, plan_of([*arguments, *switch]).total)
    if best is not None:
        yield best


def table(found: Plan) -> str:
    """The plan as lines of text, in GiB and billions of numbers."""
    head = f"{'':<36}{'precision':<20}{'numbers':>10}{'GiB':>9}"
    rows = [
        f"{c.name:<36}{', '.join(c.dtypes):<20}{_short(c.numbers):>10}{c.size / GIB:>9.2f}" for c in found.components
    ]
    rows.append(f"{'total that stays in memory':<66}{found.resident / GIB:>9.2f}")
    rows += ["", f"{'peak in addition, by part of an update':<66}{'GiB':>9}"]
    rows += [f"{name:<66}{size / GIB:>9.2f}" for name, size in found.phases.items()]
    return "\n".join([head, *rows, "", f"{'peak in total':<66}{found.total / GIB:>9.2f}"])


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count) if count else ""


def _several(devices: Any) -> bool:
    return len(devices) > 1 if isinstance(devices, list) else str(devices).isdigit() and int(devices) > 1


def _buckets(found: Plan) -> Component:
    """DDP's own copies of all gradients, in which they are averaged."""
    gradients = [c for c in found.components if c.name.endswith("gradients")]
    numbers, size = sum(c.numbers for c in gradients), sum(c.size for c in gradients)
    return Component("ddp: buckets of gradients", ("float32",), numbers, size)
