"""Lightning's summary under a strategy whose parameters hold nothing between two uses."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelSummary, RichModelSummary

from gdmd_lightning.callbacks.summary import count_whole
from gdmd_lightning.configuration import training


class OfShards(pl.LightningModule):
    """Two weights of 12 numbers as ZeRO-3 leaves them, the second of them frozen, and a whole one."""

    def __init__(self):
        super().__init__()
        self.whole, self.shards = torch.nn.Linear(2, 3, bias=False), torch.nn.Bilinear(1, 1, 1)
        for parameter in self.shards.parameters():
            parameter.data, parameter.ds_numel = torch.empty(0), 12
        self.shards.bias.requires_grad_(False)


@pytest.mark.parametrize("kind", [ModelSummary, RichModelSummary])
def test_summary_counts_what_is_in_shards(kind):
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[kind(max_depth=2)])
    count_whole(trainer)
    (callback,) = [each for each in trainer.callbacks if isinstance(each, ModelSummary)]
    found = callback._summary(trainer, OfShards())
    assert (found.total_parameters, found.trainable_parameters) == (30, 18)
    assert dict(zip(found.layer_names, found.param_nums)) == {"whole": 6, "shards": 24}
    assert found._max_depth == 2


def test_fit_counts_whole_under_deepspeed(fast_fit, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(training.DistillationCLI, "fit", lambda *_, **__: None)
    strategy = "--trainer.strategy.class_path=MultiEngineDeepSpeedStrategy"
    trainer = training.run([*fast_fit, strategy, "--trainer.enable_model_summary=true"]).trainer
    (callback,) = [each for each in trainer.callbacks if isinstance(each, ModelSummary)]
    assert callback._summary(trainer, OfShards()).total_parameters == 30
