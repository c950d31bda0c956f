"""Phases: announced to a listener, free without one."""

from contextlib import contextmanager

import pytest
import tiny

from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.phases import listening, phase


class Notes:
    """Notes which phases begin and end."""

    def __init__(self):
        self.seen = []

    @contextmanager
    def __call__(self, name):
        self.seen.append(f"+{name}")
        try:
            yield
        finally:
            self.seen.append(f"-{name}")


def test_listener_enters_nested_phases():
    notes = Notes()
    with listening(notes), phase("a"), phase("b"):
        pass
    assert notes.seen == ["+a", "+b", "-b", "-a"]


def test_listening_ends_with_its_block_even_on_an_error():
    notes = Notes()
    with pytest.raises(RuntimeError, match="stop"), listening(notes), phase("a"):
        raise RuntimeError("stop")
    with phase("b"):
        pass
    assert notes.seen == ["+a", "-a"]


def test_every_listener_hears():
    outer, inner = Notes(), Notes()
    with listening(outer):
        with listening(inner), phase("a"):
            pass
        with phase("b"):
            pass
    assert outer.seen == ["+a", "-a", "+b", "-b"]
    assert inner.seen == ["+a", "-a"]


@pytest.mark.parametrize("method", [DMD, GDMD])
def test_update_announces_its_phases(tiny_pipeline, method):
    notes = Notes()
    with listening(notes):
        tiny.train(tiny.module(tiny_pipeline, method, matching=Matching()), 1)
    steps = {f"{role} {part}" for role in ("generator", "fake_score") for part in ("forward", "backward")}
    judged = {"decoding", "reward"} if method is GDMD else set()
    assert {name[1:] for name in notes.seen} == steps | judged | {"rollout", "targets", "optimizer step"}
    assert notes.seen.count("+optimizer step") == notes.seen.count("-optimizer step") == 6
