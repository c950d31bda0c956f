"""The settings of a reward or detector as plain values."""

from __future__ import annotations

from dataclasses import is_dataclass
from inspect import getmro
from types import FunctionType
from typing import Any

import torch

from gdmd_lightning.geneval.answers import Answers
from gdmd_lightning.geneval.colors import ColorClassifier
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.rewards.base import Reward

WITHOUT_EFFECT = ("batch_size",)
"""Settings that do not change a score."""


def described(value: Any) -> Any:
    """A value as JSON can write it: of an object with settings, its class and public attributes.

    Weights are known by their path. What is neither a plain value nor an object with settings is known by its class.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, list | tuple):
        return [described(each) for each in value]
    if isinstance(value, dict):
        return {str(key): described(each) for key, each in value.items()}
    if isinstance(value, torch.dtype):
        return str(value)
    name = type(value).__qualname__
    if not (isinstance(value, Reward | Detector | Answers | ColorClassifier) or is_dataclass(value)):
        return name
    # Detectors have their rules on the class.
    owners = [vars(kind) for kind in getmro(type(value))] + [vars(value)]
    public = {key for owner in owners for key, found in owner.items() if key[0] != "_" and not _is_code(found)}
    return {"class": name, **{key: described(getattr(value, key)) for key in sorted(public - set(WITHOUT_EFFECT))}}


def _is_code(value: Any) -> bool:
    return isinstance(value, FunctionType | property | classmethod | staticmethod)
