"""A module back from its checkpoint, with the configuration that the checkpoint carries."""

from __future__ import annotations

from typing import Any

import torch
from jsonargparse import ArgumentError, ArgumentParser

import gdmd_lightning.components  # noqa: F401  (makes every class known by its bare name)
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import Provenance, check_fits, read_checkpoint


def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(DistillationModule, "model", required=True)
    return parser


def describe_module(model: Any) -> str:
    """The model part of a parsed configuration as text, to travel in checkpoints."""
    parser = _parser()
    return str(parser.dump(parser.parse_object({"model": model}), skip_validation=True))


def load_module(path: str, device: str = "cpu") -> DistillationModule:
    """The module of a checkpoint, its roles loaded, in evaluation mode.

    Raises:
        UserError: If the checkpoint is unreadable, carries no configuration, or does not fit the pipeline on disk.
    """
    checkpoint = read_checkpoint(path)
    provenance = Provenance(**checkpoint.get("provenance", {}))
    if not provenance.configuration:
        raise UserError(f"{path!r} carries no configuration", where="checkpoint", remedy="use one that fit has written")
    parser = _parser()
    try:
        configured = parser.parse_string(provenance.configuration)
    except ArgumentError as error:
        raise UserError(f"the configuration in {path!r} is not understood: {error}", where="checkpoint") from error
    configured.model.init_args.start_from = None  # all it gave is in the checkpoint
    module: DistillationModule = parser.instantiate_classes(configured).model
    module.provenance = provenance
    module.configure_model()
    check_fits(module, checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=False)
    module.to(torch.device(device)).eval()
    module.family.to(module.device)
    return module
