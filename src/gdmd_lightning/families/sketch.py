"""A pipeline's shapes without its weights: every network on the meta device, from the configurations alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import PACKAGE

ARCHITECTURES = PACKAGE / "assets" / "architectures"
"""Configurations of published models, by hub id."""

_FILES = ("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json")


def sketch_pipeline(cls: Any, path: str, dtype: str, *, drop: Sequence[str] = ()) -> Any:
    """The pipeline that ``load_pipeline`` would load, without weights.

    Networks are on the meta device, frozen and in evaluation mode; the scheduler is real; tokenizers are ``None``.

    Args:
        cls: The pipeline's class.
        path: A diffusers directory, with or without weights, or a hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        drop: Components to leave out.

    Raises:
        UserError: If a configuration is missing or describes no network of the installed libraries.
    """
    directory = configurations(path)
    try:
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
        known = inspect.signature(cls.__init__).parameters
        parts: dict[str, Any] = {}
        for name in known.keys() & index.keys():
            entry = index[name]
            if not isinstance(entry, list):
                parts[name] = entry
            elif name in drop or entry[0] is None:
                parts[name] = None
            else:
                parts[name] = _component(entry[0], entry[1], directory / name, getattr(torch, dtype))
        absent = {name for name, p in known.items() if p.default is p.empty and name != "self"} - parts.keys()
        pipeline = cls(**parts, **dict.fromkeys(absent))
    except UserError:
        raise
    except Exception as error:  # diffusers, transformers and json raise a dozen unrelated types here
        raise UserError(
            f"the configuration of {path!r} is not understood: {' '.join(str(error).split())[:300]}",
            where="family.path",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sketch_model(cls: Any, path: str) -> nn.Module:
    """A transformers model on the meta device, from the ``config.json`` in a directory or of a hub id.

    Raises:
        UserError: If there is none.
    """
    network: nn.Module = _on_meta(
        lambda: cls(cls.config_class.from_pretrained(str(configurations(path)))), torch.float32
    )
    return network


def configurations(path: str) -> Path:
    """The directory that holds the configurations of a model.

    A hub id is looked for among those that ship, so that nothing is fetched; of others the configurations alone are.

    Raises:
        UserError: If they cannot be fetched.
    """
    directory = Path(path).expanduser()
    for place in (directory, ARCHITECTURES / path):
        if place.is_dir():
            return place
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except Exception as error:  # a dozen unrelated types: no such model, no access, no network
        raise UserError(
            f"the configuration of {path!r} cannot be fetched: {' '.join(str(error).split())[:200]}",
            where="path",
            remedy="give a directory, or be online and logged in where the model asks for it",
        ) from error


def _component(library: str, kind: str, directory: Path, dtype: torch.dtype) -> Any:
    """A network on the meta device, a real scheduler, or nothing for what works on texts and pictures."""
    if library == "diffusers":
        import diffusers

        part: Any = getattr(diffusers, kind)
        if not issubclass(part, nn.Module):
            return part.from_pretrained(str(directory))
        return _on_meta(lambda: part.from_config(part.load_config(str(directory))), dtype)
    import transformers

    model: Any = getattr(transformers, kind)
    if not (isinstance(model, type) and issubclass(model, nn.Module)):
        return None
    configured: Any = model
    return _on_meta(lambda: configured(configured.config_class.from_pretrained(str(directory))), dtype)


def _on_meta(build: Any, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        network = build()
    # Tables that are computed in numpy come as real tensors.
    # The plain method: diffusers' own warns of precisions that none of these networks mixes.
    return nn.Module.to(network, "meta", dtype).requires_grad_(False).eval()
