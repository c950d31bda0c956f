"""Text is encoded once a prompt."""

import torch

from gdmd_lightning.data.embeddings import PromptEmbeddings
from gdmd_lightning.families.base import Conditioning


class Letters:
    """A family whose embedding of a text is the codes of its first letters."""

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
