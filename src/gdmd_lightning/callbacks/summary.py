"""Lightning's summary of a module, with whole sizes where DeepSpeed has shards."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import ModelSummary as Summary
from torch import nn


class WholeSummary(Summary):
    """Counts parameters as whole; one in shards of ZeRO-3 has no numbers of its own between two uses."""

    @property
    def param_nums(self) -> list[int]:
        """Of each module, in the order of the rows."""
        return [_whole(layer._module.parameters()) for layer in self._layer_summary.values()]

    @property
    def total_parameters(self) -> int:
        """Of the whole module."""
        return _whole(self._model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Those that an optimizer steps."""
        return _whole(parameter for parameter in self._model.parameters() if parameter.requires_grad)


def count_whole(trainer: pl.Trainer) -> None:
    """Let the trainer's summaries count parameters as whole."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelSummary):
            callback._summary = partial(_summary, callback._max_depth)  # type: ignore[method-assign]


def _summary(depth: int, trainer: pl.Trainer, module: pl.LightningModule) -> WholeSummary:
    return WholeSummary(module, max_depth=depth)


def _whole(parameters: Iterable[nn.Parameter]) -> int:
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
