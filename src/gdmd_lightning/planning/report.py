"""The plan of a configuration of ``fit``, what each memory option would save, and both as text."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pydoc import locate
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.configuration.messages import readable_error
from gdmd_lightning.configuration.restore import module_parser, score_parser
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.data.prompt_data import samples_of_rank
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.planning.footprint import Component, Plan, plan, size_of_scores
from gdmd_lightning.planning.strategy import Strategy, read_strategy

GIB = 2**30
EVALUATION = "evaluation"
"""The phase of scoring."""
SPARE = GIB
"""Assumed for what torch's allocator does not hand out: CUDA context, workspaces of cuBLAS and cuDNN, gaps."""

SWITCHES = (
    ("--model.memory.gradient_checkpointing=true",),
    ("--model.lora.rank=32",),
    ("--model.family.init_args.dtype=bfloat16",),
    ("--trainer.precision=bf16-mixed",),
    ("--model.memory.vae_slicing=true",),
    ("--model.memory.vae_tiling=true",),
    ("--model.memory.reward=offloaded",),
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
    return plan_of_settings(parse(arguments, "plan"))[0]


def plan_of_settings(settings: Any, evaluation: int | None = None) -> tuple[Plan, Strategy]:
    """The plan of a parsed configuration, including the reserve, and the strategy that it is for.

    Args:
        settings: The parsed configuration.
        evaluation: Bytes of the networks of its evaluations' scores, if they are known already.

    Raises:
        UserError: If it names something that cannot be planned.
    """
    module: DistillationModule = _built(module_parser(), model=settings.model).model
    strategy = read_strategy(settings.trainer, module, divided=settings.data.global_batch_size is not None)
    module.check_data(settings.data)
    adapters, sharded = module.lora is not None, bool(strategy.splits)
    module.speed.check(module.family, module.no_overlap(), adapters=adapters, sharded=sharded)
    data, samples = settings.data, _samples(settings, strategy.ranks)
    module.check_batch(samples * strategy.ranks, data.group_size)
    if samples > data.batch_size:
        module.limit_micro_batches(data.batch_size)
    found = plan(
        module,
        samples // module.accumulate,
        settings.trainer.precision,
        strategy=strategy,
    )
    spare = Component("context, workspaces, gaps (assumed)", (), 0, SPARE)
    if evaluation is None:
        evaluation = max(map(size_of_scores, _evaluations(settings)), default=0)
    phases = found.phases | ({EVALUATION: evaluation} if evaluation else {})
    return replace(found, components=(*found.components, spare), phases=phases), strategy


def _evaluations(settings: Any) -> Iterator[list[TaskScore]]:
    """The scores of each evaluation; its prompts, which may have to be downloaded, are not read."""
    given = settings.trainer.callbacks
    for callback in given if isinstance(given, list) else [given]:
        kind = callback and locate(callback.class_path)
        if isinstance(kind, type) and issubclass(kind, GenerationEvaluation):
            yield _built(score_parser(), scores=callback.init_args.scores).scores


def _built(parser: ArgumentParser, **settings: Any) -> Namespace:
    """The objects of these settings; what a constructor refuses is a :class:`UserError`, as in ``fit``."""
    try:
        return parser.instantiate_classes(Namespace(**settings))
    except (ArgumentError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise readable_error(error, "plan") from error


def batch_line(settings: Any, ranks: int = 1) -> str:
    """The batch of an update in words: samples, groups, and micro-batches if there are any.

    Args:
        settings: The parsed configuration.
        ranks: Number of GPUs.
    """
    batch, size, micro = settings.data.batch_size, _samples(settings, ranks), settings.model.init_args.micro_batch_size
    if size > batch:
        micro = min(batch, micro or batch)
    at_once = "all at once" if micro is None or micro >= size else f"in micro-batches of {micro}"
    return f"{size} samples per update on each GPU, {settings.data.group_size} per prompt, {at_once}"


def _samples(settings: Any, ranks: int) -> int:
    data = settings.data
    accumulate = settings.model.init_args.accumulate
    return samples_of_rank(data.batch_size, data.group_size, data.global_batch_size, ranks, accumulate)


def savings(arguments: Sequence[str], settings: Any, now: Plan, limit: int) -> Iterator[Saving]:
    """What each option that is not in effect yet would save, each as soon as it is known.

    Args:
        arguments: As for ``fit``.
        settings: What they say, parsed.
        now: The plan without any of them.
        limit: Bytes of the GPU, for the size of micro-batches.
    """
    evaluation = now.phases.get(EVALUATION, 0)  # no option changes it
    found = itertools.chain(
        _micro_batches(arguments, settings, limit, evaluation), _options(arguments, settings, evaluation)
    )
    return (saving for saving in found if saving.total < now.total)


def _options(arguments: Sequence[str], settings: Any, evaluation: int) -> Iterator[Saving]:
    size, group = settings.data.batch_size, settings.data.group_size
    smaller = max(size // 2 // group, 1) * group
    learns = "fake_score" in settings.model.init_args
    for every in (*SWITCHES, (f"--data.batch_size={smaller}",)):
        switch = tuple(each for each in every if learns or "fake_score" not in each)
        try:
            other = parse([*arguments, *switch], "plan")
            saving = Saving(switch, plan_of_settings(other, evaluation)[0].total) if other != settings else None
        except UserError:
            continue  # this configuration does not take the option
        if saving is not None:
            yield saving


def _micro_batches(arguments: Sequence[str], settings: Any, limit: int, evaluation: int) -> Iterator[Saving]:
    """The largest micro-batch, by halving, with which the plan fits; else the smallest."""
    micro = settings.model.init_args.micro_batch_size or settings.data.batch_size
    best: Saving | None = None
    while micro > 1 and (best is None or best.total > limit):
        micro //= 2
        switch = (f"--model.micro_batch_size={micro}",)
        best = Saving(switch, plan_of_settings(parse([*arguments, *switch], "plan"), evaluation)[0].total)
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
    rows += ["", f"{'peak in total':<66}{found.total / GIB:>9.2f}"]
    if found.host:
        rows += ["", f"{'in the memory of the host, for each GPU':<66}{'GiB':>9}"]
        rows += [f"{c.name:<66}{c.size / GIB:>9.2f}" for c in found.host]
    return "\n".join([head, *rows])


def _short(count: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return str(count) if count else ""
