"""Saved models of transformers: found, loaded, and complete."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.hub import loading_problem

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

AGAIN = "save or download it again"
TRAINING_ONLY = "criterion."
"""Weights of a training loss, which published files leave out."""


WEIGHTS_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")


def is_local(path: str) -> bool:
    """Whether a path is meant as a place on this machine, not as a hub id; the place need not exist.

    A file of weights is one, and so is anything with more than one slash, which no hub id has.
    """
    place = Path(path)
    named = place.expanduser().is_absolute() or path.startswith(".") or path.count("/") > 1
    return named or place.suffix.lower() in WEIGHTS_SUFFIXES or place.exists()


def check_directory(path: str, where: str, kind: str, types: Sequence[str] = ()) -> None:
    """Fail early if a local directory is no saved model of a kind; of a hub id nothing is known.

    Args:
        path: Directory or hub id.
        where: What needs it, for the message.
        kind: Class of the model; its ``model_type`` is the beginning of the name in lower case.
        types: The values of ``model_type`` where the class does not tell.

    Raises:
        UserError: If it has no ``config.json``, or that of another model.
    """
    if not is_local(path):
        return
    remedy = f"give a {kind} directory"
    try:
        config = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path!r} has no config.json", where=where, remedy=remedy) from error
    except ValueError as error:
        raise UserError(f"{path!r} has a broken config.json", where=where, remedy=AGAIN) from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(found, str) or not (found in types if types else kind.lower().startswith(found)):
        raise UserError(f"{path!r} is a model of type {found!r}", where=where, remedy=remedy)


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


def load_pretrained(kind: Any, path: str, where: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of transformers from safetensors.

    Args:
        kind: The model's class.
        path: Directory or hub id.
        where: What needs it, for messages.
        dtype: Precision of its weights.

    Raises:
        UserError: If the files do not load, or do not hold exactly the model's weights.
    """
    options = {"use_safetensors": True, "dtype": dtype, "output_loading_info": True}
    model, report = load_any(kind, path, where, **options)
    # Constants that earlier versions of transformers saved; the models number positions themselves.
    unexpected = {key for key in report["unexpected_keys"] if not str(key).endswith(".position_ids")}
    missing = {key for key in report["missing_keys"] if not str(key).startswith(TRAINING_ONLY)}
    found = {"missing": missing, "mismatched": report["mismatched_keys"], "unexpected": unexpected}
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
