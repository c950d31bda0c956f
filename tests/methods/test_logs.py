"""What is logged in an update is what happened in it."""

import pytest
import tiny
import torch

from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.matching import MatchingModule


@pytest.mark.parametrize("method", [DMD, GDMD])
def test_logged_sample_std_is_that_of_the_generators_samples(tiny_pipeline, method, monkeypatch) -> None:
    samples = []
    whole = MatchingModule.train_fake_score

    def watched(self, batch, state, x0, learn):
        samples.append(x0.clone())
        return whole(self, batch, state, x0, learn)

    monkeypatch.setattr(MatchingModule, "train_fake_score", watched)
    logged = tiny.train(tiny.module(tiny_pipeline, method), 1).logged_metrics
    torch.testing.assert_close(logged["train/sample_std"], samples[0].std())
