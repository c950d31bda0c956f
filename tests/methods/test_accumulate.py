"""Several batches of the data module per update: the same update as that of one large batch in micro-batches."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
from lightning.pytorch.callbacks import Callback
from world import THREE, GaussianFamily, Liking, module_of, three_prompts

from gdmd_lightning.callbacks.interruption import StopOnSignal, interrupted_checkpoint
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.refl import ReFL

METHODS = {"dmd": (DMD, {}), "gdmd": (GDMD, {"reward": Liking()}), "refl": (ReFL, {"reward": Liking()})}


def data(place: Path, batch_size: int) -> PromptDataModule:
    """Seven prompts, twice each."""
    file = place / "seven.txt"
    file.write_text("\n".join(f"{k / 3:.2f} {1 - k / 5:.2f}" for k in range(7)))
    return PromptDataModule(str(file), batch_size=batch_size, group_size=2, shuffle_buffer=0)


class Seen(Callback):
    """Prompts and groups of every update."""

    def __init__(self) -> None:
        self.batches = []

    def on_train_batch_start(self, trainer, module, batch, batch_index):
        self.batches.append(([prompt.text for prompt in batch.prompts], batch.groups.tolist()))


def fit(module, updates: int, place: Path, batch_size: int, *callbacks, resume: Path | None = None) -> pl.Trainer:
    trainer = tiny.trainer(updates, callbacks=list(callbacks), default_root_dir=place)
    trainer.fit(module, datamodule=data(place, batch_size), ckpt_path=resume)
    return trainer


@pytest.mark.parametrize("name", METHODS)
def test_accumulated_batches_are_one_large_batch_in_micro_batches(name, tmp_path):
    method, options = METHODS[name]
    parts, whole = module_of(method, accumulate=2, **options), module_of(method, micro_batch_size=4, **options)
    start = {k: v.clone() for k, v in whole.state_dict().items()}
    seen, alone = Seen(), Seen()
    trainer = fit(parts, 3, tmp_path, 4, seen)
    fit(whole, 3, tmp_path, 8, alone)
    assert seen.batches == alone.batches
    assert seen.batches[0][1] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert trainer.global_step == parts.updates == 3
    assert tiny.differing(dict(parts.state_dict()), dict(whole.state_dict())) == []
    assert tiny.differing(start, dict(whole.state_dict())) != []


@pytest.mark.parametrize(("micro", "largest"), [(None, 4), (3, 3), (64, 4)])
def test_no_more_than_a_batch_is_in_memory_at_once(micro, largest, tmp_path, monkeypatch):
    sizes, judged = [], Liking()
    predict = GaussianFamily.predict_velocity

    def noted(self, network, x, *rest):
        sizes.append(len(x))
        return predict(self, network, x, *rest)

    monkeypatch.setattr(GaussianFamily, "predict_velocity", noted)
    fit(module_of(ReFL, reward=judged, accumulate=3, micro_batch_size=micro), 1, tmp_path, 4)
    assert max(sizes) == largest
    assert {len(images) for images, _ in judged.asked} <= set(range(1, largest + 1))
    assert sum(len(images) for images, _ in judged.asked) == 12


def test_judge_of_groups_scores_no_more_than_a_batch_at_once(tmp_path):
    judged = Liking()
    fit(module_of(GDMD, reward=judged, accumulate=2), 1, tmp_path, 4)
    assert {len(images) for images, _ in judged.asked} == {4}


def test_resumed_run_equals_an_uninterrupted_one(tmp_path):
    path = tmp_path / "two.ckpt"
    fit(module_of(accumulate=3), 2, tmp_path, 4).save_checkpoint(path)
    assert read_checkpoint(str(path))["PromptDataModule"]["batches"] == 2
    seen, resumed, whole = Seen(), module_of(accumulate=3), module_of(accumulate=3)
    fit(resumed, 4, tmp_path, 4, seen, resume=path)
    alone = Seen()
    fit(whole, 4, tmp_path, 4, alone)
    assert seen.batches == alone.batches[2:]
    assert tiny.differing(dict(resumed.state_dict()), dict(whole.state_dict())) == []


def test_a_signal_saves_the_last_whole_update(tmp_path):
    stop = StopOnSignal()

    class Signal(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_index):
            stop.received = 15 if module.updates == 1 else 0

    trainer = fit(module_of(accumulate=2), 9, tmp_path, 4, Signal(), stop)
    content = read_checkpoint(str(interrupted_checkpoint(trainer)))
    assert content["PromptDataModule"]["batches"] == content["global_step"] == content["provenance"]["updates"] == 2


def test_resuming_with_other_samples_per_update_is_refused(tmp_path):
    path = tmp_path / "one.ckpt"
    fit(module_of(accumulate=2), 1, tmp_path, 4).save_checkpoint(path)
    with pytest.raises(UserError, match=r"its prompts with 8 samples of an update on all ranks \(now 4\)"):
        fit(module_of(), 2, tmp_path, 4, resume=path)
    fit(module_of(), 2, tmp_path, 8, resume=path)  # the same samples per update


def test_a_later_fit_without_accumulation_has_single_batches_again(tmp_path):
    prompts, seen = three_prompts(tmp_path), Seen()
    tiny.trainer(1).fit(module_of(accumulate=2), datamodule=prompts)
    tiny.trainer(1, callbacks=[seen]).fit(module_of(), datamodule=prompts)
    assert [len(texts) for texts, _ in seen.batches] == [2 * len(THREE)]


def test_accumulation_of_other_batches_is_refused(tmp_path):
    loader = three_prompts(tmp_path).train_dataloader()
    with pytest.raises(UserError, match=r"model\.accumulate: it is 2, but the batches are not those of a PromptData"):
        tiny.trainer(1).fit(module_of(accumulate=2), loader)


def test_a_loader_without_its_data_module_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    module, loader = module_of(), three_prompts(tmp_path).train_dataloader()
    monkeypatch.setattr(module, "configure_model", None)
    with pytest.raises(
        UserError, match=r"^trainer\.fit: .*a loader of prompts without its data module.*=PromptDataModule"
    ):
        tiny.trainer(1).fit(module, loader)


def test_a_plan_follows_the_whole_update(monkeypatch):
    from gdmd_lightning.planning import footprint

    asked = []

    def peaks(follow, batch_size, micro):
        asked.append((batch_size, micro))
        return {"update": 0.0}

    monkeypatch.setattr(footprint, "_peaks", peaks)
    monkeypatch.setattr(GaussianFamily, "sketch", lambda self: self.load().to("meta"), raising=False)
    footprint.plan(DMD(GaussianFamily(), height=16, width=24, accumulate=3), 4)
    footprint.plan(DMD(GaussianFamily(), height=16, width=24), 4)
    assert asked == [(12, 4), (4, None)]


def test_the_planned_batch_is_that_of_an_update(fast_fit):
    from gdmd_lightning.configuration.training import parse
    from gdmd_lightning.planning.report import batch_line

    line = "16 samples per update on each GPU, 4 per prompt, in micro-batches of 8"
    assert batch_line(parse([*fast_fit, "--model.accumulate=2"])) == line
