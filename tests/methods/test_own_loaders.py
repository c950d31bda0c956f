"""Batches of prompts that a loader or data module of the user makes, and what is refused in their place."""

import warnings

import pytest
import tiny
from lightning.pytorch import LightningDataModule
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.trainer.states import RunningStage
from torch.utils.data import DataLoader
from world import TEXTS, Liking, module_of, three_prompts

from gdmd_lightning.data.embedding_cache import EmbeddingCache
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.prompts import Prompt, PromptBatch

PROMPTS = [Prompt(text) for text in TEXTS]


def twice(prompts: list[Prompt]) -> PromptBatch:
    return PromptBatch([prompt for prompt in prompts for _ in range(2)], 2)


BATCHES = [twice(PROMPTS[:2]), twice(PROMPTS[1:3])]
OWN = {
    "collate_fn": lambda: DataLoader(PROMPTS[:3], batch_size=2, collate_fn=twice),
    "workers": lambda: DataLoader(PROMPTS[:3], batch_size=2, collate_fn=twice, num_workers=1),
    "batches": lambda: DataLoader(BATCHES, batch_size=None),
    "generator": lambda: (batch for batch in BATCHES),
}


class Data(LightningDataModule):
    def __init__(self, loader: object) -> None:
        super().__init__()
        self.loader = loader

    def train_dataloader(self) -> object:
        return self.loader


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("within", ["loader", "data module"])
def test_batches_of_a_users_loader_train(kind, within):
    module, loader = module_of(), OWN[kind]()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*overridden.*")
        if within == "loader":
            tiny.trainer(2).fit(module, loader)
        else:
            tiny.trainer(2).fit(module, datamodule=Data(loader))
    assert module.updates == 2


def test_a_precision_that_converts_input_leaves_batches_alone():
    """As DeepSpeed's and FSDP's do."""
    assert DoublePrecision().convert_input(BATCHES[0]) is BATCHES[0]


@pytest.mark.parametrize(
    ("loader", "what"),
    [
        (BATCHES, "it has a list, whose items Lightning takes for loaders"),
        (DataLoader(PROMPTS, batch_size=2), "the DataLoader's default collate_fn makes no PromptBatch"),
    ],
    ids=["list", "default collate_fn"],
)
def test_a_loader_that_yields_no_batch_of_prompts_is_refused_before_anything_is_loaded(loader, what, monkeypatch):
    module = module_of()
    monkeypatch.setattr(module, "configure_model", None)
    with pytest.raises(UserError, match=rf"^trainer\.fit: {what}.*; use datamodule=PromptDataModule"):
        tiny.trainer(1).fit(module, loader)


@pytest.mark.parametrize("items", [PROMPTS, TEXTS], ids=["prompts", "texts"])
def test_another_batch_is_refused(items):
    for data in ({}, {"datamodule": Data(DataLoader(items, batch_size=2, collate_fn=list))}):
        given = [] if data else [DataLoader(items, batch_size=2, collate_fn=list)]
        with pytest.raises(UserError, match=r"^trainer\.fit: a batch is a list, not a PromptBatch; use .*collate_fn"):
            tiny.trainer(1).fit(module_of(), *given, **data)


def test_a_method_is_asked_whether_it_can_learn_from_the_batches(monkeypatch):
    module, asked = module_of(), []
    monkeypatch.setattr(module, "check_batch", lambda *batch: asked.append(batch))
    tiny.trainer(1).fit(module, OWN["batches"]())
    assert asked == [(4, 2)]


def test_a_method_that_compares_samples_refuses_one_of_each_prompt():
    loader = DataLoader([PromptBatch(PROMPTS[:2], 1)], batch_size=None)
    with pytest.raises(UserError, match=r"^data\.group_size: it is 1, but DiffusionNFT compares the samples"):
        tiny.trainer(1).fit(module_of(DiffusionNFT, reward=Liking(), steps=2), loader)


@pytest.mark.parametrize(("prompts", "group_size"), [(PROMPTS[:3], 2), ([], 1), (PROMPTS[:2], 0)])
def test_groups_are_whole(prompts, group_size):
    with pytest.raises(UserError, match=rf"^PromptBatch: the number of prompts is {len(prompts)}, not a positive mult"):
        PromptBatch(prompts, group_size)


def test_embedding_ahead_needs_a_data_module_that_knows_its_prompts(tmp_path):
    module = module_of(embedding_cache=EmbeddingCache(str(tmp_path)))
    with pytest.raises(UserError, match="no data module says which prompts to embed"):
        tiny.trainer(1).fit(module, datamodule=Data(OWN["batches"]()))


def test_only_training_moves_the_position_of_a_data_module(tmp_path):
    data = three_prompts(tmp_path)
    data.trainer = tiny.trainer(1)
    for stage, counted in ((RunningStage.VALIDATING, 0), (RunningStage.TRAINING, 1)):
        data.trainer.state.stage = stage
        assert data.transfer_batch_to_device(BATCHES[0], "cpu", 0) is BATCHES[0]
        assert data._handed_over == counted
