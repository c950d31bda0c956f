"""What is logged in an update is what happened in it."""

import pytest
import tiny
import torch

from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD


@pytest.mark.parametrize("method", [DMD, GDMD])
def test_the_spread_of_the_students_latents_is_logged(tiny_pipeline, method, monkeypatch) -> None:
    samples = []
    whole = method.generator_loss

    def watched(self, batch, conditioning):
        loss, x, logs = whole(self, batch, conditioning)
        samples.append(x.detach().clone())
        return loss, x, logs

    monkeypatch.setattr(method, "generator_loss", watched)
    logged = tiny.train(tiny.module(tiny_pipeline, method), 1).logged_metrics
    torch.testing.assert_close(logged["train/sample_std"], samples[0].std())
