"""Resumed runs: every setting takes effect or is refused by name; teacher and prompts are known by content."""

import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch

from gdmd_lightning.configuration.training import parse
from gdmd_lightning.data.hub import HubDataset
from gdmd_lightning.data.identity import content_of
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.resuming import REFUSED, TAKES_EFFECT, classes_of, flattened
from gdmd_lightning.roles import LoRA, Optimization

BEFORE = Optimization(learning_rate=1e-4, warmup=4)
AFTER = Optimization(learning_rate=3e-4, betas=(0.5, 0.6), weight_decay=0.2, warmup=8)


class RandomReward(tiny.Brightness):
    """Draws from all global generators, as a user's reward may."""

    def score(self, images, prompts):
        drawn = torch.rand(len(images)) + random.random() + float(np.random.rand())
        return super().score(images, prompts) + drawn


@pytest.fixture(scope="module")
def full(tiny_pipeline, tmp_path_factory):
    """Checkpoint of two updates of DMD."""
    path = tmp_path_factory.mktemp("full") / "two.ckpt"
    tiny.train(tiny.module(tiny_pipeline, DMD, generator=BEFORE), 2).save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def adapters(tiny_pipeline, tmp_path_factory):
    """Checkpoint of one update of DMD with adapters."""
    path = tmp_path_factory.mktemp("adapters") / "one.ckpt"
    tiny.train(tiny.module(tiny_pipeline, DMD, lora=LoRA(2, 4)), 1).save_checkpoint(path)
    return path


def resume(module, path, updates, **data):
    trainer = tiny.trainer(updates)
    prompts = PromptDataModule(**{"source": "shapes", "batch_size": 8, "group_size": 4, **data})
    trainer.fit(module, datamodule=prompts, ckpt_path=str(path))
    return trainer


def load(module, path):
    module.configure_model()
    module.on_load_checkpoint(read_checkpoint(str(path)))


def test_every_setting_of_model_and_data_is_in_exactly_one_table(fast_fit):
    adapters = ["--model.lora.rank=2", "--model.embedding_cache.directory=x"]
    keys = set()
    for more in ([], adapters, ["--config", "shapes_dmd.yaml"], ["--model=ReFL", "--model.reward=tiny.Brightness"]):
        settings = parse([*fast_fit, *more]).clone().as_dict()
        keys |= {key for part in ("model", "data") for key, _ in flattened(settings[part], part)}
    assert {"model.lora.alpha", "model.generator.betas", "model.family.path", "model.reward", "data.seed"} <= keys
    assert "model.margin" in keys
    wrong = {key: len(classes_of(key)) for key in sorted(keys) if len(classes_of(key)) != 1}
    assert wrong == {}


def test_tables_name_the_settings_that_matter():
    assert classes_of("model.generator.learning_rate") == [TAKES_EFFECT]
    assert classes_of("model.fake_score.algorithm") == classes_of("model.lora.alpha") == [REFUSED]
    assert classes_of("data.source") == [REFUSED]


def test_resumed_run_uses_the_optimizer_settings_it_is_given(tiny_pipeline, full):
    trainer = resume(tiny.module(tiny_pipeline, DMD, generator=AFTER), full, 5)
    group = trainer.optimizers[0].param_groups[0]
    # Five of the eight updates of the new warm-up are done, and the old one would be over; the schedule has moved on.
    assert group["lr"] == pytest.approx(3e-4 * 6 / 8)
    assert (tuple(group["betas"]), group["weight_decay"]) == ((0.5, 0.6), 0.2)
    assert trainer.optimizers[1].param_groups[0]["weight_decay"] == Optimization().weight_decay
    assert trainer.optimizers[0].state_dict()["state"][0]["step"] == 5


def test_resumed_run_with_the_same_settings_has_the_same_schedule_to_the_bit(tiny_pipeline, full, tmp_path):
    whole = tiny.train(tiny.module(tiny_pipeline, DMD, generator=BEFORE), 3)
    resumed = resume(tiny.module(tiny_pipeline, DMD, generator=BEFORE), full, 3)
    whole.save_checkpoint(tmp_path / "whole.ckpt")
    resumed.save_checkpoint(tmp_path / "resumed.ckpt")
    one, other = (read_checkpoint(str(tmp_path / f"{name}.ckpt")) for name in ("whole", "resumed"))
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "PromptDataModule"):
        assert tiny.differing(one[part], other[part]) == [], part


def test_resuming_with_other_adapter_settings_is_refused_by_name(tiny_pipeline, adapters):
    with pytest.raises(UserError, match=r"model\.lora\.alpha 4 \(now 8\); resume with the settings"):
        load(tiny.module(tiny_pipeline, DMD, lora=LoRA(2, 8)), adapters)


def test_starting_from_other_adapter_settings_is_refused_by_name(tiny_pipeline, adapters):
    with pytest.raises(UserError, match=r"model\.start_from '.*': it was trained with model\.lora\.alpha 4 \(now 8\)"):
        tiny.module(tiny_pipeline, DMD, lora=LoRA(2, 8), start_from=str(adapters)).configure_model()
    with pytest.raises(UserError, match=r"model\.lora\.targets \[.*\] \(now \['to_q'\]\)"):
        tiny.module(tiny_pipeline, DMD, lora=LoRA(2, 4, ("to_q",)), start_from=str(adapters)).configure_model()


def test_resuming_with_another_optimizer_algorithm_is_refused_by_name(tiny_pipeline, full):
    module = tiny.module(tiny_pipeline, DMD, fake_score=Optimization(algorithm="adamw_8bit"))
    with pytest.raises(UserError, match=r"model\.fake_score\.algorithm 'adamw' \(now 'adamw_8bit'\)"):
        load(module, full)


def test_resuming_with_another_setting_of_the_family_is_refused_by_name(tiny_pipeline, full):
    module = tiny.module(tiny_pipeline, DMD)
    module.family.max_sequence_length = 7
    with pytest.raises(UserError, match=r"model\.family\.max_sequence_length 0 \(now 7\)"):
        load(module, full)


def test_teacher_is_known_by_its_weights_not_by_its_path(tiny_pipeline, full, adapters, tmp_path):
    moved = shutil.copytree(tiny_pipeline, tmp_path / "moved")
    load(tiny.module(moved, DMD), full)
    tiny.module(moved, DMD, lora=LoRA(2, 4), start_from=str(adapters)).configure_model()
    other = tiny.save_pipeline(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"trained with another teacher: the weights in '.*other' differ"):
        load(tiny.module(other, DMD), full)
    with pytest.raises(UserError, match=r"model\.start_from .*trained with another teacher"):
        tiny.module(other, DMD, lora=LoRA(2, 4), start_from=str(adapters)).configure_model()


def test_resuming_with_another_start_is_refused(tiny_pipeline, full, tmp_path):
    begun, copy = tmp_path / "begun.ckpt", tmp_path / "copy.ckpt"
    tiny.train(tiny.module(tiny_pipeline, DMD, start_from=str(full)), 1).save_checkpoint(begun)
    shutil.copy(full, copy)
    load(tiny.module(tiny_pipeline, DMD, start_from=str(copy)), begun)
    resumed = tiny.module(tiny_pipeline, DMD)
    load(resumed, begun)
    assert resumed.provenance.started_from == read_checkpoint(str(begun))["provenance"]["started_from"] != ""
    with pytest.raises(UserError, match="a resumed run ignores it"):
        load(tiny.module(tiny_pipeline, DMD, start_from=str(begun)), begun)


def test_prompt_file_is_known_by_its_content_not_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = tmp_path / "p.txt"
    prompts.write_text("a red circle\na green square\n")
    state = PromptDataModule(str(prompts), batch_size=8, group_size=4).state_dict()
    PromptDataModule("./p.txt", batch_size=8, group_size=4).load_state_dict(state)
    shutil.copy(prompts, tmp_path / "moved.txt")
    PromptDataModule("moved.txt", batch_size=8, group_size=4).load_state_dict(state)
    prompts.write_text("a red circle\na blue square\n")
    with pytest.raises(UserError, match=r"source '.*p.txt' \(now 'p.txt', whose content differs\)"):
        PromptDataModule("p.txt", batch_size=8, group_size=4).load_state_dict(state)


def test_local_data_set_is_known_by_the_content_of_its_files(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for place in (one, other):
        place.mkdir()
        (place / "train.jsonl").write_text('{"prompt": "a red circle"}\n')
    assert content_of(HubDataset(str(one))) == content_of(HubDataset(str(other)))
    (other / "train.jsonl").write_text('{"prompt": "a red square"}\n')
    assert content_of(HubDataset(str(one))) != content_of(HubDataset(str(other)))


def test_data_set_on_the_hub_is_known_by_its_revision(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: SimpleNamespace(sha=f"of {name}"))
    assert content_of(HubDataset("organization/name")) == "organization/name of organization/name"


def test_malformed_position_is_one_line():
    data = PromptDataModule("shapes", batch_size=8, group_size=4)
    for batches in (None, "3", -1, True):
        with pytest.raises(UserError, match=f"checkpoint: its count of batches is {batches!r}"):
            data.load_state_dict({**data.state_dict(), "batches": batches})


def test_content_of_a_source_is_that_of_the_start_of_training(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n")
    data = PromptDataModule(str(path), batch_size=8, group_size=4)
    data.setup("fit")
    path.write_text("a blue circle\n")
    before = data.state_dict()["content"]
    assert before != PromptDataModule(str(path), batch_size=8, group_size=4).state_dict()["content"]


def test_resuming_from_weights_only_is_refused(tiny_pipeline, tmp_path):
    module = tiny.module(tiny_pipeline, DMD)
    tiny.train(module, 1).save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    with pytest.raises(UserError, match=r"it has no optimizer states, only weights; .*model\.start_from"):
        resume(tiny.module(tiny_pipeline, DMD), tmp_path / "weights.ckpt", 2)


def test_reward_that_draws_from_global_generators_resumes_exactly(tiny_pipeline, tmp_path):
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    whole = tiny.module(tiny_pipeline, GDMD, reward=RandomReward())
    tiny.train(whole, 3, callbacks=[tiny.SaveAfter(2, tmp_path / "two.ckpt")])
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    resumed = tiny.module(tiny_pipeline, GDMD, reward=RandomReward())
    resume(resumed, tmp_path / "two.ckpt", 3)
    assert tiny.differing(dict(whole.state_dict()), dict(resumed.state_dict())) == []


def test_moments_of_a_loop_in_another_memory_layout_are_resumed(tiny_pipeline, full, tmp_path):
    """As a run with torch's default optimizer or with other strides wrote them; a fused step reads raw memory."""
    checkpoint = read_checkpoint(str(full))
    for state in checkpoint["optimizer_states"]:
        for group in state["param_groups"]:
            group["fused"] = None
        for moments in state["state"].values():
            for name in ("exp_avg", "exp_avg_sq"):
                if moments[name].ndim == 2:
                    moments[name] = moments[name].t().contiguous().t()
    torch.save(checkpoint, tmp_path / "loop.ckpt")
    runs = [tiny.module(tiny_pipeline, DMD, generator=BEFORE) for _ in range(2)]
    for module, path in zip(runs, (full, tmp_path / "loop.ckpt"), strict=True):
        trainer = resume(module, path, 3)
        assert all(group["fused"] for optimizer in trainer.optimizers for group in optimizer.param_groups)
    one, other = (module.state_dict() for module in runs)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
