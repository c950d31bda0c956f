"""Text is encoded once a prompt, and ahead of training where a run keeps its embeddings."""

import shutil
import weakref
from itertools import islice

import pytest
import tiny
import torch

from gdmd_lightning.data.embedding_cache import EmbeddingCache, EmbeddingStore
from gdmd_lightning.data.embeddings import PromptEmbeddings, embed_ahead, fill, prompts_of_run
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import Conditioning
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.prompts import Prompt


class Letters:
    """A family whose embedding of a text is the codes of its first letters."""

    empty = Conditioning(torch.zeros(1, 1, 1))

    def __init__(self):
        self.asked = []

    def encode(self, texts):
        self.asked.append(list(texts))
        return Conditioning(torch.tensor([[[float(ord(text[0]))]] for text in texts]))


def test_rows_follow_the_texts_and_each_is_encoded_once():
    family = Letters()
    embeddings = PromptEmbeddings(family)
    first = embeddings(["b", "a", "b"])
    second = embeddings(["c", "a"])
    assert first.sequence.flatten().tolist() == [ord("b"), ord("a"), ord("b")]
    assert second.sequence.flatten().tolist() == [ord("c"), ord("a")]
    assert family.asked == [["b"], ["a"], ["c"]]


def test_the_least_recently_used_prompts_are_forgotten():
    family = Letters()
    embeddings = PromptEmbeddings(family, capacity=2)
    for texts in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):
        embeddings(texts)
    assert family.asked == [["a"], ["b"], ["c"], ["b"]]


def test_a_batch_larger_than_the_capacity_is_still_served():
    rows = PromptEmbeddings(Letters(), capacity=1)(["a", "b", "c"])
    assert rows.sequence.flatten().tolist() == [ord(c) for c in "abc"]


def test_families_of_unpadded_prompts_are_refused(tmp_path):
    class Unpadded(Letters):
        empty = Conditioning(torch.zeros(1, 1, 1))

        def encode(self, texts):
            return Conditioning(torch.zeros(len(texts), max(map(len, texts)), 1))

    with pytest.raises(UserError, match="pad all prompts to one length"):
        fill(EmbeddingStore(str(tmp_path), "letters"), Unpadded(), ["ab"], batch_size=1, shard_size=1)


# What a run will ask for.


class Draws:
    """A callback with prompts of its own."""

    prompts = [Prompt("a castle"), Prompt("a dog")]


@pytest.fixture
def pets(tmp_path):
    (tmp_path / "pets.txt").write_text("a dog\na cat\na dog\n\na cat\n")
    return PromptDataModule(str(tmp_path / "pets.txt"), batch_size=4)


def test_a_run_asks_for_its_prompts_those_of_its_callbacks_and_the_empty_one_each_once(pets):
    assert prompts_of_run(pets, [object(), Draws()], most=10, each=4) == ["", "a castle", "a dog", "a cat"]


def test_evaluation_is_a_callback_with_prompts_of_its_own(pets):
    from gdmd_lightning.callbacks.evaluation import GenerationEvaluation

    evaluation = GenerationEvaluation([], count=6)
    assert {prompt.text for prompt in evaluation.prompts} < set(prompts_of_run(pets, [evaluation], most=100, each=4))


def test_more_prompts_than_allowed_are_refused_with_what_they_cost(pets):
    assert len(prompts_of_run(pets, [], most=3, each=4)) == 3
    with pytest.raises(UserError, match=r"more than 2 distinct prompts; each takes 4,000,000 bytes .*2 take 8 MB"):
        prompts_of_run(pets, [], most=2, each=4_000_000)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_endless_shapes_are_a_closed_vocabulary(split):
    data = PromptDataModule("shapes", split=split)
    texts = set(prompts_of_run(data, [], most=10_000, each=4))
    drawn = {prompt.text for prompt in islice(data.prompts.read(), 2000)}
    assert drawn <= texts
    assert len(texts) < 1000


# Real pipelines with random weights.

TEXTS = ["a red circle", "two blue squares left of a green triangle", "", "a triangle"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """A directory of each family, written once."""
    place = tmp_path_factory.mktemp("pipelines")
    return {
        "sd3": tiny.save_pipeline(place / "sd3"),
        "sdxl": tiny.save_sdxl(place / "sdxl"),
        "flux2": tiny.save_flux2(place / "flux2"),
    }


def loaded(kind, path):
    match kind:
        case "sd3":
            family = SD3Family(str(path), max_sequence_length=4)
        case "sdxl":
            family = SDXLFamily(str(path))
        case _:
            family = Flux2KleinFamily(str(path), max_sequence_length=32, text_layers=(1, 2, 3))
    family.load()
    return family


@pytest.fixture(scope="module", params=["sd3", "sdxl", "flux2"])
def family(request, pipelines):
    return loaded(request.param, pipelines[request.param])


def test_a_batch_of_prompts_is_each_alone_and_comes_back_from_disk_to_the_bit(family, tmp_path):
    store = EmbeddingStore(str(tmp_path), family.text_fingerprint())
    fill(store, family, TEXTS, batch_size=4, shard_size=3)
    batched, alone = PromptEmbeddings(family, store=store)(TEXTS), PromptEmbeddings(family)(TEXTS)
    written = Conditioning.concat([family.encode(TEXTS[:3]), family.encode(TEXTS[3:])])
    for name in ("sequence", "pooled", "ids"):
        one, other, third = (getattr(c, name) for c in (batched, alone, written))
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)
            assert one.equal(third)


def test_the_fingerprint_is_the_same_after_encoding_and_at_another_path(family, pipelines, tmp_path):
    kind = next(kind for kind, path in pipelines.items() if str(path) == family.path)
    before = family.text_fingerprint()
    family.encode(TEXTS)
    family._fingerprint = None
    shutil.copytree(pipelines[kind], tmp_path / "elsewhere")
    assert before == family.text_fingerprint() == loaded(kind, tmp_path / "elsewhere").text_fingerprint()


def test_freed_encoders_are_gone_and_their_embeddings_still_come(pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(filter(None, TEXTS)))
    data = PromptDataModule(str(tmp_path / "prompts.txt"), batch_size=4)
    alone = {"rank": 0, "world_size": 1, "barrier": lambda: None}
    for kind, path in pipelines.items():
        family = loaded(kind, path)
        told, empty = PromptEmbeddings(family)(TEXTS), family.empty
        encoders = [part for name, part in family.loaded.components.items() if name.startswith("text_encoder") and part]
        gone = [weakref.ref(thing) for encoder in encoders for thing in (encoder, next(encoder.parameters()))]
        assert len(gone) >= 2
        del encoders
        prompts = embed_ahead(family, EmbeddingCache(str(tmp_path / kind)), data, [], **alone)
        assert [reference() for reference in gone] == [None] * len(gone)
        torch.testing.assert_close(prompts(TEXTS).sequence, told.sequence, atol=1e-6, rtol=1e-6)
        assert family.empty.sequence.equal(empty.sequence)
        with pytest.raises(UserError, match="the text encoders are freed, and 'a purple cow' was not embedded"):
            prompts(["a purple cow"])
        # A second fit of the same module finds all it needs.
        embed_ahead(family, EmbeddingCache(str(tmp_path / kind)), data, [], **alone)


def test_encoders_that_are_kept_embed_what_nobody_announced(pipelines, tmp_path):
    family = loaded("sd3", pipelines["sd3"])
    data = PromptDataModule("shapes", split="test")
    cache = EmbeddingCache(str(tmp_path), free_encoders=False)
    prompts = embed_ahead(family, cache, data, [], rank=0, world_size=1, barrier=lambda: None)
    assert prompts(["a purple cow"]).sequence.equal(family.encode(["a purple cow"]).sequence)


def test_another_models_cache_is_refused(pipelines, tmp_path):
    one, other = (
        SD3Family(str(path), max_sequence_length=4)
        for path in (pipelines["sd3"], tiny.save_pipeline(tmp_path / "pipeline", seed=1))
    )
    for each in (one, other):
        each.load()
    assert refused(one, other, tmp_path / "cache")


def test_a_cache_of_another_maximal_length_is_refused(pipelines, tmp_path):
    one, other = (SD3Family(str(pipelines["sd3"]), max_sequence_length=length) for length in (4, 5))
    for each in (one, other):
        each.load()
    assert refused(one, other, tmp_path / "cache")


def test_one_changed_weight_in_the_middle_makes_another_model(pipelines, tmp_path):
    one, other = (loaded("sd3", pipelines["sd3"]) for _ in range(2))
    weight = max(other.loaded.text_encoder_2.parameters(), key=torch.numel)
    weight.view(-1)[len(weight.view(-1)) // 2] += 1e-6
    assert refused(one, other, tmp_path / "cache")


def refused(one, other, directory):
    fill(EmbeddingStore(str(directory), one.text_fingerprint()), one, TEXTS, batch_size=4, shard_size=4)
    EmbeddingStore(str(directory), one.text_fingerprint())
    with pytest.raises(UserError, match="embeddings of another model"):
        EmbeddingStore(str(directory), other.text_fingerprint())
    return True
