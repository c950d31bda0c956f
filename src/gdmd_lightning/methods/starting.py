"""A run that starts from the roles of another one, possibly of another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.finite import check_finite
from gdmd_lightning.methods.provenance import Provenance, read_provenance
from gdmd_lightning.methods.resuming import adapter_settings, check_teacher, raise_if_changed
from gdmd_lightning.roles import REFERENCE
from gdmd_lightning.roles.adapters import is_start, stacked, start_name

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule


def take_over(module: RoleModule, path: str) -> None:
    """Load roles of another run, possibly of another method.

    The checkpoint must contain the generator. A role that it lacks starts as usual: a trained one as the
    teacher, an average or snapshot as the role that it follows. With ``lora.start: merged`` trained roles start with
    new adapters on top of those in the checkpoint, and all others as the roles that they follow.

    Raises:
        UserError: If a role does not fit.
    """
    origin, theirs = _read(path)
    _check_adapters(module, origin, path)
    if merges(module):
        theirs = _merged(module, theirs, origin, path)
        module.roles.adopt(theirs)
    roles = module.roles
    own = roles.shapes()
    starts = {name: value for name, value in theirs.items() if is_start(name)}
    taken: dict[str, dict[str, Tensor]] = {}
    followers = []
    for spec in roles.specs:
        names = roles.names_of(spec.name)
        found = {name: theirs[name] for name in names if name in theirs and spec.name != REFERENCE}
        if not found and (spec.name != "generator" or merges(module)):
            followers += [spec] if spec.source is not None else []
            continue
        if len(found) < len(names) or any(tuple(found[name].shape) != own[name] for name in found):
            raise _other_model(spec.name, path)
        taken[spec.name] = found
    check_finite(starts | {name: value for found in taken.values() for name, value in found.items()}, f"in {path!r}")
    if starts:
        roles.load_state_dict(starts, strict=False)
    for role, found in taken.items():
        roles.fill(role, found)
    for spec in followers:
        roles.copy(str(spec.source), spec.name)


def merges(module: RoleModule) -> bool:
    """Whether the module's roles start on merged adapters."""
    return module.lora is not None and module.lora.start == "merged"


def build_starts(module: RoleModule) -> None:
    """Build the frozen adapters that the roles start on, without their values; for plans.

    Raises:
        UserError: If ``start_from`` has none.
    """
    if module.start_from is not None and merges(module):
        origin, theirs = _read(module.start_from)
        module.roles.adopt(_merged(module, theirs, origin, module.start_from))


def _read(path: str) -> tuple[Provenance | None, dict[str, Tensor]]:
    """A checkpoint's provenance, which one of an early version lacks, and the tensors of its roles."""
    checkpoint = read_checkpoint(path)
    origin = read_provenance(checkpoint) if "provenance" in checkpoint else None
    state = checkpoint["state_dict"]
    return origin, {name.removeprefix("roles."): state[name] for name in state if name.startswith("roles.")}


def _merged(
    module: RoleModule, theirs: Mapping[str, Tensor], origin: Provenance | None, path: str
) -> dict[str, Tensor]:
    """The frozen adapters of trained roles: their averages in the checkpoint, with what those were on top of.

    Heads, which are no adapters, are continued.

    Raises:
        UserError: If the checkpoint has no adapter of the generator, or does not record the adapters' scale.
    """
    settings = {} if origin is None else origin.settings
    rank, alpha = settings.get("model.lora.rank"), settings.get("model.lora.alpha")
    if rank is None or alpha is None:
        raise UserError(
            "it has no adapters to merge, or does not record their scale",
            where=f"model.start_from {path!r}",
            remedy="use a checkpoint of a run with model.lora, or model.lora.start: continued",
        )
    out = {name: value for name, value in theirs.items() if name.split(".")[0] in module.roles.heads}
    for role in set(module.roles.trained) - set(module.roles.heads):
        names = [spec.name for spec in module.roles.specs if spec.average_of == role] + [role]
        found = next((name for name in names if any(f".lora_A.{name}." in each for each in theirs)), None)
        if found is None and role == "generator":
            raise _other_model(role, path)
        if found is None:
            continue
        for layer, factors in stacked(theirs, {start_name(role): 1.0, found: alpha / rank}).items():
            out |= {f"{layer}.lora_{kind}.{start_name(role)}.weight": part for kind, part in factors.named()}
    return out


def _other_model(role: str, path: str) -> UserError:
    return UserError(
        f"its {role} is not this model's",
        where=f"model.start_from {path!r}",
        remedy="use the same family, size and adapters (model.lora)",
    )


def _check_adapters(module: RoleModule, origin: Provenance | None, path: str) -> None:
    """Adapters have a meaning only with their own scale, on the network that they were trained on.

    Raises:
        UserError: If either differs. Checkpoints of earlier versions do not record them.
    """
    if module.lora is None or origin is None:
        return
    adapters = {key: value for key, value in origin.settings.items() if key.startswith("model.lora.")}
    try:
        if adapters.get("model.lora.rank") is not None and not merges(module):
            raise_if_changed(adapters, adapter_settings(module), "use the same values, or model.lora.start: merged")
        check_teacher(module, origin)
    except UserError as error:
        raise UserError(error.what, where=f"model.start_from {path!r}", remedy=error.remedy) from error
