"""Pipelines without weights: every network on the meta device, built from the configuration files alone."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.autoencoder import keep_range
from gdmd_lightning.locations import PACKAGE

ARCHITECTURES = PACKAGE / "assets" / "architectures"
"""Configurations of published models, by hub id."""

_FILES = ("model_index.json", "config.json", "*/config.json", "*/scheduler_config.json")


def sketch_pipeline(cls: Any, path: str, dtype: str, *, drop: Sequence[str] = ()) -> Any:
    """Build the pipeline that ``load_pipeline`` would load, without weights.

    Networks are frozen on the meta device, in evaluation mode. The scheduler is real; tokenizers are ``None``.

    Args:
        cls: The pipeline's class.
        path: A diffusers directory, with or without weights, or a hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        drop: Components to leave out.

    Raises:
        UserError: If a configuration is missing, or the installed libraries do not know its network.
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
            f"the configuration of {path!r} cannot be used: {' '.join(str(error).split())[:300]}",
            where="family.path",
        ) from error
    pipeline.set_progress_bar_config(disable=True)
    keep_range(pipeline.vae)
    return pipeline


def sketch_model(cls: Any, path: str) -> nn.Module:
    """Build a transformers model on the meta device from its ``config.json``.

    Args:
        cls: The model's class.
        path: A directory, or a hub id.

    Raises:
        UserError: If there is no configuration.
    """
    network: nn.Module = _on_meta(
        lambda: cls(cls.config_class.from_pretrained(str(configurations(path)))), torch.float32
    )
    return network


def sketch_auto(cls: Any, path: str) -> nn.Module:
    """Like :func:`sketch_model` for an ``AutoModel`` class, which chooses the network by its ``config.json``."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(str(configurations(path)))
    network: nn.Module = _on_meta(lambda: cls.from_config(config), torch.float32)
    return network


def configurations(path: str) -> Path:
    """Find the directory with a model's configurations.

    A hub id is first looked up among the configurations shipped with the package, which needs no network
    access. If it is not among them, only its configuration files are downloaded.

    Raises:
        UserError: If they cannot be downloaded.
    """
    directory = Path(path).expanduser()
    for place in (directory, ARCHITECTURES / path):
        if place.is_dir():
            return place
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=list(_FILES)))
    except Exception as error:  # unrelated types: no such model, no access, no network
        raise UserError(
            f"the configuration of {path!r} cannot be downloaded: {' '.join(str(error).split())[:200]}",
            where="path",
            remedy="give a directory, or go online, and log in if the model requires it",
        ) from error


def _component(library: str, kind: str, directory: Path, dtype: torch.dtype) -> Any:
    """A network on the meta device, a real scheduler, or ``None`` for tokenizers and image processors."""
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
    # Some networks compute tables in numpy, which become real tensors even here, so everything is moved.
    # nn.Module.to avoids a warning about mixed precision from diffusers' override.
    return nn.Module.to(network, "meta", dtype).requires_grad_(False).eval()
