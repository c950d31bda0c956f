"""When a figure has moved too far, and which one moved first."""

import pytest

from gdmd_lightning.callbacks.collapse_rules import Fall, Move, Rise, Track, first_move
from gdmd_lightning.errors import UserError

NAN = float("nan")


def alarms(rule, values) -> list[bool]:
    track, out = Track(rule), []
    for update, value in enumerate(values, 1):
        track.observe(update, value)
        out.append(track.alarmed)
    return out


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (Fall("x", by=0.25, patience=1), [1, 2, 1.5, 1.49], [0, 0, 0, 1]),
        (Fall("x", by=0.25, against="start", patience=1), [1, 2, 0.75, 0.74], [0, 0, 0, 1]),
        (Fall("x", by=0.25, patience=2), [1, 0.5, 1, 0.5, 0.5, 0.9], [0, 0, 0, 0, 1, 0]),
        (Fall("x", by=0.25, patience=1), [-4, -5, -5.1], [0, 0, 1]),
        (Fall("x", by=0.5, patience=1), [NAN, 1, NAN, 1], [0, 0, 1, 0]),
        (Fall("x", by=0.5, patience=1), [0, 0, 0], [0, 0, 0]),
        (Rise("x", factor=2, window=3, patience=1), [9, 1, 2, 4, 4.1], [0, 0, 0, 0, 1]),
        (Rise("x", factor=2, window=3, patience=2), [1, 1, 1, 3, 3, 3, 1], [0, 0, 0, 0, 1, 1, 0]),
        (Rise("x", factor=2, window=3, patience=1), [1, 2, 4, 8, 16], [0, 0, 0, 1, 1]),
        (Rise("x", factor=2, window=1, patience=1), [-2, -0.1, 0.01], [0, 0, 1]),
        (Rise("x", factor=2, window=1, patience=1), [NAN, 1, NAN, 2], [0, 0, 1, 0]),
    ],
)
def test_a_rule_alarms_when_its_figure_has_moved_too_far_for_long_enough(rule, values, expected):
    assert alarms(rule, values) == [bool(each) for each in expected]


def test_the_first_to_move_is_the_one_that_left_earliest_and_has_not_come_back():
    tracks = [Track(Fall(name, by=0.2, patience=3)) for name in ("alarmed", "first", "returned")]
    for update, values in enumerate([(1, 1, 1), (1, 1, 0), (1, 0.5, 0), (0, 0.4, 1), (0, 0.3, 1)], 1):
        for track, value in zip(tracks, values, strict=True):
            track.observe(10 * update, value)
    assert first_move(tracks) == Move("first", 30, 1, 0.5)
    assert str(first_move(tracks)) == "first at update 30, from 1 to 0.5"
    assert first_move([]) is None


def test_a_track_continues_from_its_state():
    whole, rule = Track(Rise("x", factor=2, window=2)), Rise("x", factor=2, window=2)
    for update, value in enumerate([1, 1, 5, 6]):
        resumed = Track(rule)
        resumed.load_state_dict(whole.state_dict())
        assert resumed == whole
        whole.observe(update, value)
    assert whole.alarmed


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: Fall("x", by=1.0), r"^Fall\.by: it is 1\.0; use a number in \(0, 1\)$"),
        (lambda: Fall("x", by=0.1, patience=0), r"^Fall\.patience: it is 0; "),
        (lambda: Rise("x", factor=1.0), r"^Rise\.factor: it is 1\.0; use a number above 1$"),
        (lambda: Rise("x", factor=2, window=0), r"^Rise\.window: it is 0; "),
    ],
)
def test_a_rule_refuses_what_it_cannot_mean(make, expected):
    with pytest.raises(UserError, match=expected):
        make()
