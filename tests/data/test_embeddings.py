"""Prompts are encoded once, and before training if the run keeps its embeddings on disk."""

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
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.latents import Conditioning
from gdmd_lightning.prompts import Prompt


class Letters:
    """A family that embeds a text as the code of its first letter."""

    empty = Conditioning(torch.zeros(1, 1, 1))

    def __init__(self):
        self.encoded = []

    def encode(self, texts):
        self.encoded.append(list(texts))
        return Conditioning(torch.tensor([[[float(ord(text[0]))]] for text in texts]))


def test_embeddings_follow_the_texts_and_encode_each_once():
    family = Letters()
    embeddings = PromptEmbeddings(family)
    first = embeddings(["b", "a", "b"])
    second = embeddings(["c", "a"])
    assert first.sequence.flatten().tolist() == [ord("b"), ord("a"), ord("b")]
    assert second.sequence.flatten().tolist() == [ord("c"), ord("a")]
    assert family.encoded == [["b"], ["a"], ["c"]]


def test_embeddings_drop_the_least_recently_used_prompts():
    family = Letters()
    embeddings = PromptEmbeddings(family, capacity=2)
    for texts in (["a", "b"], ["a"], ["c"], ["a"], ["b"]):
        embeddings(texts)
    assert family.encoded == [["a"], ["b"], ["c"], ["b"]]


def test_embeddings_accept_a_batch_larger_than_the_capacity():
    rows = PromptEmbeddings(Letters(), capacity=1)(["a", "b", "c"])
    assert rows.sequence.flatten().tolist() == [ord(c) for c in "abc"]


def test_fill_refuses_families_that_do_not_pad_prompts(tmp_path):
    class Unpadded(Letters):
        empty = Conditioning(torch.zeros(1, 1, 1))

        def encode(self, texts):
            return Conditioning(torch.zeros(len(texts), max(map(len, texts)), 1))

    with pytest.raises(UserError, match="pad all prompts to one length"):
        fill(EmbeddingStore(str(tmp_path), "letters"), Unpadded(), ["ab"], batch_size=1, shard_size=1)


# The prompts of a run.


class Callback:
    """A callback with its own prompts."""

    prompts = [Prompt("a castle"), Prompt("a dog")]


@pytest.fixture
def pets(tmp_path):
    (tmp_path / "pets.txt").write_text("a dog\na cat\na dog\n\na cat\n")
    return PromptDataModule(str(tmp_path / "pets.txt"), batch_size=4)


def test_prompts_of_run_are_data_callbacks_and_the_empty_prompt_each_once(pets):
    assert prompts_of_run(pets, [object(), Callback()], most=10, each=4) == ["", "a castle", "a dog", "a cat"]


def test_prompts_of_run_include_those_of_the_evaluation(pets):
    from gdmd_lightning.callbacks.evaluation import GenerationEvaluation

    evaluation = GenerationEvaluation([], count=6)
    assert {prompt.text for prompt in evaluation.prompts} < set(prompts_of_run(pets, [evaluation], most=100, each=4))


def test_prompts_of_run_refuses_too_many_and_says_what_they_take(pets):
    assert len(prompts_of_run(pets, [], most=3, each=4)) == 3
    with pytest.raises(UserError, match=r"more than 2 distinct prompts; each takes 4,000,000 bytes .*2 take 8 MB"):
        prompts_of_run(pets, [], most=2, each=4_000_000)


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_of_run_cover_the_endless_shapes(split):
    data = PromptDataModule("shapes", split=split)
    texts = set(prompts_of_run(data, [], most=10_000, each=4))
    drawn = {prompt.text for prompt in islice(data.prompts.read(), 2000)}
    assert drawn <= texts
    assert len(texts) < 1000


# Real pipelines with random weights.

TEXTS = ["a red circle", "two blue squares left of a green triangle", "", "a triangle"]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """One pipeline directory per family."""
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
            family = Flux2KleinFamily(str(path), max_sequence_length=32, text_layers=(1, 2))
    family.load()
    return family


@pytest.fixture(scope="module", params=["sd3", "sdxl", "flux2"])
def family(request, pipelines):
    return loaded(request.param, pipelines[request.param])


def test_embeddings_from_disk_are_bitwise_those_encoded_and_close_to_single_ones(family, tmp_path):
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


def test_fingerprint_does_not_depend_on_use_or_path(family, pipelines, tmp_path):
    kind = next(kind for kind, path in pipelines.items() if str(path) == family.path)
    before = family.text_fingerprint()
    family.encode(TEXTS)
    family._fingerprint = None
    shutil.copytree(pipelines[kind], tmp_path / "elsewhere")
    assert before == family.text_fingerprint() == loaded(kind, tmp_path / "elsewhere").text_fingerprint()


def test_freed_encoders_release_memory_and_embeddings_stay_available(pipelines, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(filter(None, TEXTS)))
    data = PromptDataModule(str(tmp_path / "prompts.txt"), batch_size=4)
    alone = {"rank": 0, "world_size": 1, "barrier": lambda: None}
    for kind, path in pipelines.items():
        family = loaded(kind, path)
        before, empty = PromptEmbeddings(family)(TEXTS), family.empty
        encoders = [part for name, part in family.loaded.components.items() if name.startswith("text_encoder") and part]
        gone = [weakref.ref(part) for encoder in encoders for part in (encoder, next(encoder.parameters()))]
        assert len(gone) >= 2
        del encoders
        prompts = embed_ahead(family, EmbeddingCache(str(tmp_path / kind)), data, [], **alone)
        assert [reference() for reference in gone] == [None] * len(gone)
        torch.testing.assert_close(prompts(TEXTS).sequence, before.sequence, atol=1e-6, rtol=1e-6)
        assert family.empty.sequence.equal(empty.sequence)
        with pytest.raises(UserError, match="the text encoders are freed, and 'a purple cow' was not embedded"):
            prompts(["a purple cow"])
        # A second fit of the same module finds everything in the cache.
        embed_ahead(family, EmbeddingCache(str(tmp_path / kind)), data, [], **alone)


def test_kept_encoders_embed_other_prompts(pipelines, tmp_path):
    family = loaded("sd3", pipelines["sd3"])
    data = PromptDataModule("shapes", split="test")
    cache = EmbeddingCache(str(tmp_path), free_encoders=False)
    prompts = embed_ahead(family, cache, data, [], rank=0, world_size=1, barrier=lambda: None)
    assert prompts(["a purple cow"]).sequence.equal(family.encode(["a purple cow"]).sequence)


def test_cache_of_another_model_is_refused(pipelines, tmp_path):
    one, other = (
        SD3Family(str(path), max_sequence_length=4)
        for path in (pipelines["sd3"], tiny.save_pipeline(tmp_path / "pipeline", seed=1))
    )
    for each in (one, other):
        each.load()
    assert refused(one, other, tmp_path / "cache")


def test_cache_of_another_maximum_length_is_refused(pipelines, tmp_path):
    one, other = (SD3Family(str(pipelines["sd3"]), max_sequence_length=length) for length in (4, 5))
    for each in (one, other):
        each.load()
    assert refused(one, other, tmp_path / "cache")


class Guided(SD3Family):
    """A family of one's own that passes on the settings that it does not know."""

    def __init__(self, path: str, gain: float = 1.0, **sd3):
        super().__init__(path, **sd3)
        self.gain = gain


class Short(SD3Family):
    """A family of one's own that has chosen the settings of its base itself."""

    def __init__(self, path: str, gain: float = 1.0):
        super().__init__(path, max_sequence_length=0)
        self.gain = gain


def test_settings_that_a_family_of_ones_own_passes_on_count_too(pipelines, tmp_path):
    first = {"max_sequence_length": 4}
    families = [
        Guided(str(pipelines["sd3"]), **first | other) for other in ({}, {"max_sequence_length": 5}, {"gain": 2.0})
    ]
    one, *others = families
    settings = {"gain": 1.0, "max_sequence_length": 4, "use_t5": True, "dtype": "float32"}
    assert one.encoding_settings() == settings
    assert Short(str(pipelines["sd3"])).encoding_settings() == {"gain": 1.0}
    del settings["gain"]
    assert SD3Family(str(pipelines["sd3"]), **first).encoding_settings() == settings
    for each in families:
        each.load()
    for number, other in enumerate(others):
        assert refused(one, other, tmp_path / f"cache {number}")
    del one.gain
    with pytest.raises(UserError, match=r"^Guided: it does not keep its argument 'gain'.*set self\.gain"):
        one.encoding_settings()


def test_cache_is_refused_after_one_changed_weight(pipelines, tmp_path):
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
