"""Whether what was learned is finite: in a checkpoint, and in the shards of all ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule


def check_finite(
    content: dict[str, Any],
    when: str,
    remedy: str = "use an earlier checkpoint, or start a new run with lower learning rates",
) -> None:
    """Fail if weights hold a number that is NaN or infinite.

    Args:
        content: Tensors in nested dictionaries and lists, such as :func:`learned`.
        when: Where or when it was found, for the message.
        remedy: What to do, for the message.

    Raises:
        UserError: If it does; the message names the first such tensor.
    """
    for name, tensor in _tensors(content, ""):
        # The largest magnitude; NaN if any number is. Unlike isfinite, this needs no memory.
        if not torch.isfinite(torch.linalg.vector_norm(tensor, ord=torch.inf)):
            raise UserError(f"{name} is not finite {when}", where="checkpoint", remedy=remedy)


def learned(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What training changes in a checkpoint: weights, averages and the optimizers' moments."""
    return {name: checkpoint[name] for name in ("state_dict", "optimizer_states") if name in checkpoint}


def _tensors(part: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of floating-point numbers in nested dictionaries and lists, with their paths."""
    if isinstance(part, Tensor):
        if part.is_floating_point() and part.numel():
            yield name, part
    elif isinstance(part, dict | list | tuple):
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            yield from _tensors(value, f"{name}.{key}" if name else str(key))


def check_whole(module: RoleModule, checkpoint: dict[str, Any], when: str, remedy: str) -> None:
    """Fail on all ranks, before anything is written, if what a module saves is not finite.

    Args:
        module: The module; all ranks must call this.
        checkpoint: What it saves. Under DeepSpeed, each rank's shards are looked at as well.
        when, remedy: For the message.

    Raises:
        UserError: If a weight, average or moment is NaN or infinite.
    """
    if module.fully_sharded is None:
        check_finite(learned(checkpoint), when, remedy)
    else:  # only rank 0 has it
        _check_together(module, [learned(checkpoint)], when, remedy)
    check_shards(module, when, remedy)


def check_shards(module: RoleModule, when: str, remedy: str) -> None:
    """Fail on all ranks if a weight or moment in the shards of one is not finite; only DeepSpeed's engines have shards.

    Raises:
        UserError: If one is.
    """
    if module.multi_engine is not None:
        pieces = (piece for own in module.multi_engine.pieces().values() for piece in own)
        _check_together(module, ({piece.name: dict(piece.tensors)} for piece in pieces), when, remedy)


def _check_together(module: RoleModule, parts: Iterable[dict[str, Any]], when: str, remedy: str) -> None:
    found: UserError | None = None
    try:
        for part in parts:
            check_finite(part, when, remedy)
    except UserError as error:
        found = error
    if not module.all_ranks(found is None):
        where_else = UserError(f"a weight of another rank is not finite {when}", where="checkpoint", remedy=remedy)
        raise found or where_else
