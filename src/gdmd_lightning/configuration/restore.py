"""Build modules from configurations, and restore them from checkpoints, which carry their configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

import gdmd_lightning.components  # noqa: F401  (registers every class under its bare name)
from gdmd_lightning.configuration.messages import readable_error
from gdmd_lightning.configuration.references import resolved
from gdmd_lightning.configuration.trust import (
    WITHOUT_REWARD,
    check_places,
    denied_class,
    only_classes_of,
    read_configuration,
)
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import check_fits, read_checkpoint
from gdmd_lightning.methods.finite import check_finite
from gdmd_lightning.methods.provenance import Provenance, parsed, read_provenance
from gdmd_lightning.methods.resuming import check_teacher
from gdmd_lightning.metrics.scores import TaskScore


def module_parser() -> ArgumentParser:
    """A parser whose only argument is ``model``, any :class:`DistillationModule`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationModule, "model", required=True)
    return parser


def score_parser(command: str = "fit") -> ArgumentParser:
    """A parser whose only argument is ``scores``, a list of any :class:`TaskScore`.

    Args:
        command: The command whose ``--help`` an error points to.
    """
    parser = ArgumentParser(prog=command, exit_on_error=False)
    parser.add_argument("--scores", type=list[TaskScore])
    return parser


def describe_module(model: Any) -> str:
    """The ``model`` part of a parsed configuration as YAML, to be stored in checkpoints."""
    parser = module_parser()
    return str(parser.dump(parser.parse_object({"model": model}), skip_validation=True))


def build_module(model: Any) -> DistillationModule:
    """The module that the ``model`` part of a parsed configuration describes; nothing is loaded yet."""
    parser = module_parser()
    module: DistillationModule = parser.instantiate_classes(parser.parse_object({"model": model})).model
    return module


def picture_size(path: str) -> tuple[int, int]:
    """Height and width in pixels of the pictures of a checkpoint's generator; nothing else of it is loaded.

    Raises:
        UserError: If the checkpoint is unreadable or has no configuration.
    """
    configuration = read_provenance(read_checkpoint(path, in_memory=False)).configuration
    try:
        arguments = parsed(configuration)["model"]["init_args"]
        return int(arguments["height"]), int(arguments["width"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise _without_configuration(path) from error


def _without_configuration(path: str) -> UserError:
    return UserError(
        f"{path!r} has no configuration",
        where="checkpoint",
        remedy="use a .ckpt written by fit, or by a Trainer that did not warn about it when it began to train",
    )


def load_module(
    path: str,
    device: str = "cpu",
    role: str | None = None,
    size: tuple[int, int] | None = None,
    *,
    teacher: str | None = None,
    trust: Sequence[str] = (),
) -> DistillationModule:
    """Restore the module of a checkpoint, with its roles loaded, in evaluation mode.

    Args:
        path: A ``.ckpt`` written by ``fit``.
        device: Where the module is placed.
        role: Build only this role and the teacher, without the reward, as sampling and export need; ``None`` for all.
        size: Height and width of the pictures; ``None`` for those of the training.
        teacher: Where the checkpoint's teacher is now, a directory or a hub id; ``None`` for the directory that the
            checkpoint names.
        trust: Packages, modules or classes besides this package's own that the checkpoint may name.

    Raises:
        UserError: If the checkpoint is unreadable, has no configuration, names a class that is not trusted or a
            directory that is not here, does not fit the teacher, or holds a weight that is not finite.
    """
    checkpoint = read_checkpoint(path)
    provenance = read_provenance(checkpoint)
    if not provenance.configuration:
        raise _without_configuration(path)
    model = read_configuration(provenance.configuration, path)
    settings = model["init_args"]
    # The checkpoint already has everything that was taken from there.
    settings["start_from"] = None
    if role is not None and settings.get("reward") is not None:
        settings["reward"] = {**WITHOUT_REWARD, "init_args": {"name": _name_of_reward(provenance, settings["reward"])}}
    module = _build(model, path, teacher, trust)
    module.provenance, module.updates = provenance, provenance.updates
    if size is not None:
        module.height, module.width = size
    if role is not None:
        module.only_role(role)
    module.configure_model()
    check_fits(module, checkpoint)
    check_teacher(module, provenance)
    weights = checkpoint["state_dict"]
    check_finite({name: weights[name] for name in module.state_dict()}, f"in {path!r}")
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    module.to(torch.device(device)).eval()
    module.family.to(module.device)
    return module


def _build(model: dict[str, Any], path: str, teacher: str | None, trust: Sequence[str]) -> DistillationModule:
    """Build the module that a checkpoint's configuration describes, from trusted classes and local files only."""
    if teacher is not None:
        if not isinstance(model["init_args"].get("family"), dict):
            raise UserError(f"the configuration in {path!r} has no family", where="checkpoint")
        model["init_args"]["family"].setdefault("init_args", {})["path"] = teacher
    model = resolved(model, path)
    if teacher is None:
        check_places(model)
    try:
        with only_classes_of(trust):
            return build_module(model)
    except (ArgumentError, ValueError, TypeError, AttributeError, ImportError, RecursionError) as error:
        readable = readable_error(error, "checkpoint")
        denied = denied_class("\n".join([str(error), str(readable)]))
        if denied is not None:
            raise UserError(
                f"it names the class {denied!r}, which is not part of gdmd_lightning and would run its module",
                where=f"checkpoint {path!r}",
                remedy=f"if you trust it, add --trust {denied}",
            ) from error
        raise readable from error


def _name_of_reward(provenance: Provenance, reward: Any) -> str:
    """The reward's name; a checkpoint of an earlier version has only its class."""
    named = reward.get("class_path") if isinstance(reward, dict) else reward
    return provenance.reward or str(named).rpartition(".")[2]
