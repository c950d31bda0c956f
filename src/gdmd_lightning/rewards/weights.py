"""Weights of reward networks: found, read without running code, and complete."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.hub import loading_problem

AGAIN = "save or download it again"


def is_local(path: str) -> bool:
    """Whether a path is meant as a place on this machine, not as a hub id."""
    return Path(path).expanduser().is_absolute() or path.startswith(".") or Path(path).exists()


def check_directory(path: str, where: str, kind: str) -> None:
    """Fail early if a local directory is no saved model.

    Args:
        path: Directory or hub id.
        where: What needs it, for the message.
        kind: Class of the model.

    Raises:
        UserError: If it has no ``config.json``.
    """
    if is_local(path) and not (Path(path).expanduser() / "config.json").is_file():
        raise UserError(f"{path!r} has no config.json", where=where, remedy=f"give a {kind} directory")


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


def check_complete(keys: Mapping[str, Any], where: str, source: str, network: str) -> None:
    """Fail unless a file holds exactly a network's weights; libraries would draw missing ones at random.

    Args:
        keys: Names of weights that are ``missing``, ``mismatched`` or ``unexpected``.
        where: What needs them, for the message.
        source: The file or directory.
        network: What the weights should be those of.

    Raises:
        UserError: The message names the first weight and the number of them.
    """
    for kind in ("missing", "mismatched", "unexpected"):
        if wrong := sorted(map(str, keys[kind])):
            raise UserError(
                f"the weights in {source!r} are not those of {network}: {len(wrong)} {kind}, the first {wrong[0]}",
                where=where,
                remedy=AGAIN,
            )


def load_pretrained(kind: Any, path: str, where: str) -> Any:
    """A model of transformers in float32 from safetensors.

    Args:
        kind: The model's class.
        path: Directory or hub id.
        where: What needs it, for messages.

    Raises:
        UserError: If the files do not load, or do not hold exactly the model's weights.
    """
    options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    model, report = load_any(kind, path, where, **options)
    # Constants that earlier versions of transformers saved; the models number positions themselves.
    unexpected = {key for key in report["unexpected_keys"] if not str(key).endswith(".position_ids")}
    found = {"missing": report["missing_keys"], "mismatched": report["mismatched_keys"], "unexpected": unexpected}
    check_complete(found, where, path, "its config.json")
    return model


def load_any(kind: Any, path: str, where: str, **options: Any) -> Any:
    """``kind.from_pretrained(path)``: a model, tokenizer or processor of transformers.

    Raises:
        UserError: If the files do not load.
    """
    try:
        return kind.from_pretrained(path, **options)
    except Exception as error:  # transformers and safetensors raise a dozen unrelated types here
        problem, remedy = loading_problem(path, error)
        raise UserError(f"{path!r} {problem}", where=where, remedy=remedy) from error


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
