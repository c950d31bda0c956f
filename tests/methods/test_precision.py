"""Trainer precisions: trained weights stay float32, and clipping sees gradients at their own scale."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision
from world import GaussianFamily, module_of, three_prompts

from gdmd_lightning.engines.precision import check_precision
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.objectives.distribution_matching import dm_loss
from gdmd_lightning.roles import Optimization

CONVERTING = ["bf16-true", "16-true", "64-true", "64", "transformer-engine", "transformer-engine-float16"]


@pytest.mark.parametrize("precision", CONVERTING)
def test_precisions_that_convert_trained_weights_are_refused(precision):
    message = f"trainer\\.precision: '{precision}' would convert .* use bf16-mixed .* the family's dtype"
    with pytest.raises(UserError, match=message):
        check_precision(precision)


@pytest.mark.parametrize("precision", [None, 32, "32", "32-true", 16, "16", "16-mixed", "bf16", "bf16-mixed"])
def test_precisions_that_keep_trained_weights_are_accepted(precision):
    check_precision(precision)


@pytest.mark.parametrize("plugin", [HalfPrecision("bf16-true"), DoublePrecision()], ids=["half", "double"])
def test_a_trainer_in_python_is_refused_before_anything_is_loaded(plugin, monkeypatch, tmp_path):
    monkeypatch.setattr(GaussianFamily, "load", None)
    with pytest.raises(UserError, match=r"trainer\.precision: '(bf16|64)-true' would convert"):
        tiny.trainer(1, plugins=[plugin]).fit(DMD(GaussianFamily()), datamodule=three_prompts(tmp_path))


@pytest.mark.parametrize("precision", CONVERTING)
def test_fit_refuses_precisions_that_convert_trained_weights(complaint, fast_fit, precision):
    assert complaint("fit", *fast_fit, "--trainer.precision", precision).startswith(
        f"trainer.precision: '{precision}' would convert the trained weights"
    )


class Steps(Callback):
    """Norm of the gradient at each optimizer step, by role."""

    def __init__(self) -> None:
        self.norms: dict[str, list[float]] = {"generator": [], "fake_score": []}
        self.average: list[torch.Tensor] = []
        self.logs: list[dict[str, float]] = []

    def on_fit_start(self, trainer, module):
        for role, optimizer in zip(module.roles.trained, trainer.optimizers, strict=True):

            def note(optimizer, *_, role=role):
                gradients = [p.grad.norm() for group in optimizer.param_groups for p in group["params"]]
                self.norms[role].append(float(torch.stack(gradients).norm()))

            optimizer.register_step_pre_hook(note)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.average.append(module.roles.standalone("ema").shift.clone())
        self.logs.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def scaled_fit(place: Path, updates: int, scale: float | None, clip: float = 1e6) -> tuple[Steps, pl.Trainer]:
    """Train with a real gradient scaler; ``None`` for none."""
    steps, settings = Steps(), Optimization(gradient_clip=clip, warmup=1)
    module = module_of(generator=settings, fake_score=settings, matching=Matching(fake_score_updates=1))
    plugins = [] if scale is None else [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", scale))]
    trainer = tiny.trainer(updates, callbacks=[steps], plugins=plugins)
    trainer.fit(module, datamodule=three_prompts(place))
    return steps, trainer


@pytest.mark.parametrize("clip", [1e-3, 1e6], ids=["clipped", "not clipped"])
def test_scaled_gradients_are_unscaled_before_they_are_clipped_and_only_once(tmp_path, clip):
    plain, _ = scaled_fit(tmp_path, 3, None, clip)
    scaled, trainer = scaled_fit(tmp_path, 3, 2.0**16, clip)
    for role in ("generator", "fake_score"):
        assert scaled.norms[role] == pytest.approx(plain.norms[role], rel=1e-4)
        assert scaled.logs[-1][f"train/grad_norm/{role}"] == pytest.approx(
            plain.logs[-1][f"train/grad_norm/{role}"], rel=1e-4
        )
    torch.testing.assert_close(scaled.average, plain.average)
    assert trainer.global_step == 3
    assert scaled.logs[-1]["train/skipped_steps"] == 0
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**16


def test_a_scale_that_overflows_is_halved_and_the_step_skipped_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("gdmd_lightning.methods.dmd.dm_loss", lambda *inputs: 64 * dm_loss(*inputs))
    steps, trainer = scaled_fit(tmp_path, 3, 2.0**127)
    skipped = [int(logs["train/skipped_steps"]) for logs in steps.logs]
    assert sum(skipped) > 0
    assert sum(len(norms) for norms in steps.norms.values()) == 6 - sum(skipped)
    assert trainer.precision_plugin.scaler.get_scale() == 2.0 ** (127 - sum(skipped))
    assert trainer.global_step == 3
    assert skipped[0] >= 1
    assert torch.equal(steps.average[0], torch.zeros_like(steps.average[0])), "the average moved"


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
def test_a_loss_that_is_not_finite_stops_training_under_a_scaler_too(tmp_path, monkeypatch, scale):
    monkeypatch.setattr("gdmd_lightning.methods.dmd.dm_loss", lambda x, y, n: (x * float("nan")).mean())
    with pytest.raises(UserError, match="role 'generator': loss nan and gradient norm nan in update 1,"):
        scaled_fit(tmp_path, 3, scale)


def test_a_gradient_that_is_not_finite_at_a_scale_of_1_stops_training(tmp_path, monkeypatch):
    monkeypatch.setattr("gdmd_lightning.methods.dmd.dm_loss", lambda x, y, n: (x * 0).sum().sqrt())
    with pytest.raises(UserError, match="role 'generator': loss 0 and gradient norm nan in update 3,"):
        scaled_fit(tmp_path, 9, 4.0)


def test_networks_in_shards_take_every_precision_but_float16():
    for precision in ("32-true", "bf16-mixed"):
        check_precision(precision, sharded=True)
    check_precision("16-mixed")
    with pytest.raises(UserError, match=r"^trainer\.precision: '16' needs losses to be scaled"):
        check_precision("16", sharded=True)
