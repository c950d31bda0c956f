"""The trainer precisions in which training works: trained weights and averages stay float32 in all of them."""

from __future__ import annotations

from gdmd_lightning.errors import UserError

_SUPPORTED = ("32-true", "bf16-mixed", "16-mixed")
_ALIASES = {None: "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


def full_name(precision: str | int | None) -> str:
    """Lightning's full name of a precision in any of its spellings, such as ``32-true`` for 32."""
    name = None if precision is None else str(precision)
    return _ALIASES.get(name, str(name))


def check_precision(precision: str | int | None, *, sharded: bool = False) -> None:
    """Fail early if Lightning would convert trained weights and averages to another dtype.

    Args:
        precision: The trainer's, in any of Lightning's spellings.
        sharded: Whether a strategy has networks in shards, none of which scales losses as float16 needs.

    Raises:
        UserError: If it would: 16-bit types round away most steps of a generator, and nearly all of its average's. Or
            if it is float16 with shards.
    """
    kind = full_name(precision)
    if sharded and kind == "16-mixed":
        raise UserError(
            f"{str(precision)!r} needs losses to be scaled, which does not work with networks in shards",
            where="trainer.precision",
            remedy="use bf16-mixed or 32-true",
        )
    if kind not in _SUPPORTED:
        raise UserError(
            f"{str(precision)!r} would convert the trained weights and their averages, which must stay float32",
            where="trainer.precision",
            remedy="use bf16-mixed to compute in bfloat16, and the family's dtype (model.family.dtype) to load the "
            "frozen teacher in it",
        )
