"""The regression head that LAION's aesthetic predictor and ImageReward share, and the precision of heads."""

from __future__ import annotations

import torch
from torch import nn


def regression_head(width: int) -> nn.Sequential:
    """Linear layers from ``width`` over 1024, 128, 64 and 16 to 1, with dropout and without activations.

    Dropout does nothing in evaluation; it keeps the numbers in the names of published weights.
    Source: christophschuhmann/improved-aesthetic-predictor and THUDM/ImageReward, ``MLP``.
    """
    return nn.Sequential(
        nn.Linear(width, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )


def cast_but_head(network: nn.ModuleDict, dtype: torch.dtype) -> nn.ModuleDict:
    """Move all parts of a network to a precision in place, except ``head``, which stays in float32.

    Scores of different pictures differ by less than the steps of half precision, which are 1/32 for bfloat16 at 5.6.
    """
    for name, part in network.items():
        if name != "head":
            part.to(dtype)
    return network
