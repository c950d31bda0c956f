"""The regression head that LAION's aesthetic predictor and ImageReward share."""

from __future__ import annotations

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
