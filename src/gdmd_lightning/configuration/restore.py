"""Build modules from configurations, and restore them from checkpoints, which carry their configuration."""

from __future__ import annotations

from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser

import gdmd_lightning.components  # noqa: F401  (registers every class under its bare name)
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import Provenance, check_finite, check_fits, read_checkpoint


def module_parser() -> ArgumentParser:
    """A parser whose only argument is ``model``, any :class:`DistillationModule`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationModule, "model", required=True)
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
    provenance = read_checkpoint(path, in_memory=False).get("provenance", {})
    try:
        arguments = yaml.safe_load(provenance["configuration"])["model"]["init_args"]
        return int(arguments["height"]), int(arguments["width"])
    except (LookupError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{path!r} has no configuration", where="checkpoint", remedy="use a .ckpt written by fit"
        ) from error


def load_module(
    path: str, device: str = "cpu", role: str | None = None, size: tuple[int, int] | None = None
) -> DistillationModule:
    """Restore the module of a checkpoint, with its roles loaded, in evaluation mode.

    Args:
        path: A ``.ckpt`` written by ``fit``.
        device: Where the module is placed.
        role: Build only this role and the teacher; ``None`` for all. Sampling and export need one.
        size: Height and width of the pictures; ``None`` for those of the training.

    Raises:
        UserError: If the checkpoint is unreadable, has no configuration, does not fit the pipeline on disk,
            or holds a weight that is not finite.
    """
    checkpoint = read_checkpoint(path)
    provenance = Provenance(**checkpoint.get("provenance", {}))
    if not provenance.configuration:
        raise UserError(f"{path!r} has no configuration", where="checkpoint", remedy="use a .ckpt written by fit")
    parser = module_parser()
    try:
        configured = parser.parse_string(provenance.configuration)
    except ArgumentError as error:
        raise UserError(f"cannot parse the configuration in {path!r}: {error}", where="checkpoint") from error
    # The checkpoint already has everything that was taken from there.
    configured.model.init_args.start_from = None
    module: DistillationModule = parser.instantiate_classes(configured).model
    module.provenance, module.updates = provenance, provenance.updates
    if size is not None:
        module.height, module.width = size
    if role is not None:
        module.only_role(role)
    module.configure_model()
    check_fits(module, checkpoint)
    weights = checkpoint["state_dict"]
    check_finite({name: weights[name] for name in module.state_dict()}, f"in {path!r}")
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    module.to(torch.device(device)).eval()
    module.family.to(module.device)
    return module
