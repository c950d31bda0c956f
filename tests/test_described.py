"""What determines a score is in its description, in whatever form a reward keeps it; what is loaded is not."""

import functools
import json
import re
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from gdmd_lightning.described import described
from gdmd_lightning.rewards.base import Reward


class Mine(Reward):
    def score(self, images, prompts):
        return images.mean((1, 2, 3))


class Kept(Mine):
    """A reward that keeps its setting where it is seen."""

    def __init__(self, value, batch_size=1):
        self.value, self.batch_size = value, batch_size


class Private(Mine):
    """A reward that keeps its setting private, and loads something that no setting is."""

    def __init__(self, threshold: float = 0.5, batch_size: int = 1) -> None:
        self._threshold, self._batch_size = threshold, batch_size
        self._network = None

    def prepare(self):
        self._network = torch.nn.Linear(2, 2)
        assert self.tokenizer

    @functools.cached_property
    def tokenizer(self):
        return "loaded"


class Heir(Private):
    def __init__(self, scale, **options):
        super().__init__(**options)
        self._scale = scale


@dataclass
class Fields(Mine):
    _threshold: float = 0.5


class Kind(Enum):
    ONE = 1
    TWO = 2


class Unknown:
    pass


KINDS = {
    "public": Kept,
    "private": Private,
    "given to the base": lambda value: Heir(1, threshold=value),
    "of a subclass": Heir,
    "of a dataclass": Fields,
}
PAIRS = {
    "paths": (Path("a"), Path("b")),
    "tensors": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "types": (torch.ones(2, dtype=torch.bfloat16), torch.ones(2)),
    "shapes": (torch.ones(2, 1), torch.ones(1, 2)),
    "arrays": (np.array([1, 2]), np.array([1, 3])),
    "objects": (np.array(["a", 1], dtype=object), np.array(["a", 2], dtype=object)),
    "numbers": (np.float32(1), np.float32(2)),
    "sets": (frozenset({"red", "blue"}), frozenset({"red", "green"})),
    "choices": (Kind.ONE, Kind.TWO),
    "bytes": (b"a", b"b"),
    "patterns": (re.compile("a"), re.compile("b")),
    "functions": (torch.sigmoid, torch.tanh),
    "lists": ([Path("a")], [Path("b")]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pair", PAIRS)
def test_another_value_is_another_description(kind, pair):
    make, (one, other) = KINDS[kind], PAIRS[pair]
    again = one.clone() if isinstance(one, torch.Tensor) else one
    assert described(make(one)) == described(make(again)) != described(make(other))
    json.dumps(described(make(one)))


def test_private_arguments_are_described_by_a_digest_and_without_what_has_no_effect():
    assert described(Private(0.5)) == described(Private()) != described(Private(0.7))
    assert "secret" not in json.dumps(described(Private("a secret")))
    assert described(Private(batch_size=2)) == described(Private())
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=Reward)
    given = {"class_path": f"{__name__}.Private", "init_args": {"threshold": 0.7}}
    built = parser.instantiate_classes(parser.parse_object({"reward": given})).reward
    assert described(built) == described(Private(0.7))
    with pytest.raises(TypeError, match="unexpected keyword argument 'thresold'"):
        Private(thresold=1)


def test_description_is_the_same_after_loading():
    reward = Private()
    before = described(reward)
    assert "tokenizer" not in vars(reward)
    reward.prepare()
    assert described(reward) == before


def test_sets_have_an_order_and_public_attributes_are_enough():
    assert described({"b", "a", "c"}) == ["a", "b", "c"]
    assert described(Kept(0.5)) == {"class": "Kept", "name": "reward", "differentiable": False, "value": 0.5}
    assert described(Kept(Unknown()))["value"] == "Unknown"
    assert described(torch.empty(2, device="meta")) == ["torch.float32", [2]]
