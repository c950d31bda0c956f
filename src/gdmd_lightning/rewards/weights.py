"""Weights of reward networks: found, read without running code, and complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.hub import loading_problem
from gdmd_lightning.families.pretrained import AGAIN, check_complete, is_local


def check_file(path: str, filename: str, where: str) -> None:
    """Fail early if a local weights file is missing or unreadable; a hub id is not checked.

    Args:
        path: File, directory that holds ``filename``, or hub id.
        filename: Its name as published.
        where: What needs it, for the message.

    Raises:
        UserError: If it is missing, truncated, or holds more than tensors.
    """
    if is_local(path):
        _read(find_file(path, filename, where), where, "meta")


def find_file(path: str, filename: str, where: str) -> Path:
    """The file itself; from a hub id it is downloaded.

    Args:
        path: File, directory that holds ``filename``, or hub id.
        filename: Its name as published.
        where: What needs it, for the message.

    Raises:
        UserError: If it is not there.
    """
    place = Path(path).expanduser()
    if is_local(path):
        file = place / filename if place.is_dir() else place
        if not file.is_file():
            raise UserError(f"there is no file {str(file)!r}", where=where, remedy=f"give {filename}, or its directory")
        return file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(path, filename))
    except Exception as error:  # unrelated types: no such model or file, no access, no network
        problem, remedy = loading_problem(path, error)
        raise UserError(f"{path!r} {problem}", where=where, remedy=remedy) from error


def read_weights(file: Path, where: str) -> dict[str, Tensor]:
    """Tensors by name, from a safetensors file or one of ``torch.save``; of a nested ``state_dict``, that one.

    Raises:
        UserError: If the file is truncated, or holds more than tensors.
    """
    return _read(file, where, "cpu")


def fill(network: nn.Module, weights: Mapping[str, Tensor], where: str, source: str) -> None:
    """Load exactly a network's weights.

    Raises:
        UserError: If one is missing, unexpected, or of another shape; the network may then be half filled.
    """
    own = network.state_dict()
    check_complete(
        {
            "missing": own.keys() - weights.keys(),
            "unexpected": weights.keys() - own.keys(),
            "mismatched": {key for key in own.keys() & weights.keys() if own[key].shape != weights[key].shape},
        },
        where,
        source,
        "this network",
    )
    network.load_state_dict(weights)


def _read(file: Path, where: str, device: str) -> dict[str, Tensor]:
    """Tensors on the CPU, or on the meta device to check a file without reading its content."""
    try:
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                if device == "meta":
                    shapes = {name: tensors.get_slice(name).get_shape() for name in names}
                    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
                return {name: tensors.get_tensor(name) for name in names}
        content = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # safetensors, pickle, zipfile and torch raise unrelated types here
        raise UserError(f"{str(file)!r} cannot be read: {_reason(error)}", where=where, remedy=AGAIN) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{str(file)!r} holds no weights by name", where=where, remedy=AGAIN)
    return content


def _reason(error: Exception) -> str:
    """The library explains at length how to run the code in a file; here it is never run."""
    text = str(error)
    if "GLOBAL" in text:
        return "it holds more than tensors"
    if not text or text.startswith("Weights only load failed"):
        return "it is empty, or no file of weights"
    return text.split("\n")[0][:200]
