"""GenEval's rules on hand-made detections."""

import gzip
import json
import subprocess
import sys
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gdmd_lightning.geneval.rules import Detection, Rules, Verdict, counted, relations, verdict


def at(label: str, x: float, y: float, score: float = 0.95, color: str | None = None, size: float = 10) -> Detection:
    """A square object with center ``(x, y)``."""
    return Detection(label, (x - size / 2, y - size / 2, x + size / 2, y + size / 2), score, color)


def asked(tag: str, *include: dict[str, Any], exclude: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    return {"tag": tag, "include": list(include), "exclude": list(exclude)}


def clause(label: str, count: int = 1, **extra: Any) -> dict[str, Any]:
    return {"class": label, "count": count, **extra}


DOG_RIGHT_OF_CAT = asked("position", clause("cat"), clause("dog", position=["right of", 0]))
THREE_DOGS = asked("counting", clause("dog", 3), exclude=(clause("dog", 4),))


def dogs(count: int, **options: Any) -> list[Detection]:
    return [at("dog", 20 * i, 0, **options) for i in range(count)]


# Counts.


def test_verdict_accepts_a_class_that_is_there():
    assert verdict(dogs(1), asked("single_object", clause("dog"))) == Verdict(True, "")


def test_verdict_names_the_class_that_is_missing():
    two = asked("two_object", clause("dog"), clause("cat"))
    assert verdict(dogs(1), two) == Verdict(False, "expected 1 cat, found 0")


def test_verdict_names_every_clause_that_does_not_hold():
    two = asked("two_object", clause("dog"), clause("cat"))
    assert verdict([], two).reason.splitlines() == ["expected 1 dog, found 0", "expected 1 cat, found 0"]


def test_verdict_ignores_surplus_objects_without_exclude():
    assert verdict(dogs(5), asked("single_object", clause("dog"))).correct


@pytest.mark.parametrize(("found", "correct"), [(2, False), (3, True), (4, False)])
def test_verdict_with_exclude_needs_the_exact_count(found: int, correct: bool):
    assert verdict(dogs(found), THREE_DOGS).correct is correct


def test_verdict_names_the_excluded_surplus():
    assert verdict(dogs(4), THREE_DOGS).reason == "expected fewer than 4 dog, found 4"


def test_verdict_accepts_metadata_without_exclude():
    assert verdict(dogs(1), {"tag": "single_object", "include": [clause("dog")]}).correct


# Thresholds.


@pytest.mark.parametrize(("score", "correct"), [(0.29, False), (0.3, False), (0.31, True)])
def test_verdict_counts_objects_with_scores_above_the_threshold(score: float, correct: bool):
    assert verdict(dogs(1, score=score), asked("single_object", clause("dog"))).correct is correct


@pytest.mark.parametrize(("score", "correct"), [(0.5, False), (0.9, False), (0.91, True)])
def test_verdict_has_a_higher_threshold_for_counting(score: float, correct: bool):
    assert verdict(dogs(3, score=score), THREE_DOGS).correct is correct


def test_verdict_takes_thresholds_from_its_rules():
    rules = Rules(score_threshold=0.6, counting_threshold=0.1)
    assert not verdict(dogs(1, score=0.5), asked("single_object", clause("dog")), rules).correct
    assert verdict(dogs(3, score=0.5), THREE_DOGS, rules).correct


def test_verdict_limits_the_objects_of_a_class():
    seventeen = asked("counting", clause("dog", 17))
    assert not verdict(dogs(17), seventeen).correct
    assert verdict(dogs(17), seventeen, Rules(max_per_class=17)).correct


def test_verdict_applies_the_limit_before_exclude():
    many = asked("counting", clause("dog", 16), exclude=(clause("dog", 17),))
    assert verdict(dogs(20), many).correct


# Colors.


def test_verdict_needs_the_color_asked_for():
    red_dog = asked("colors", clause("dog", color="red"))
    assert verdict(dogs(1, color="red"), red_dog).correct
    assert verdict(dogs(1, color="blue"), red_dog) == Verdict(False, "expected 1 red dog, found blue")


def test_verdict_judges_the_color_of_the_most_confident_objects_only():
    red_dog = asked("colors", clause("dog", color="red"))
    sure_blue = [at("dog", 0, 0, 0.6, "red"), at("dog", 20, 0, 0.9, "blue")]
    sure_red = [at("dog", 0, 0, 0.6, "blue"), at("dog", 20, 0, 0.9, "red")]
    assert not verdict(sure_blue, red_dog).correct
    assert verdict(sure_red, red_dog).correct


def test_verdict_with_color_first_looks_for_the_color_among_all_objects():
    red_dog = asked("colors", clause("dog", color="red"))
    found = [at("dog", 0, 0, 0.6, "red"), at("dog", 20, 0, 0.9, "blue")]
    assert verdict(found, red_dog, Rules(color_first=True)).correct
    assert verdict(found[1:], red_dog, Rules(color_first=True)).reason == "expected 1 red dog, found 0"


def test_verdict_binds_each_color_to_its_class():
    both = asked("color_attr", clause("dog", color="red"), clause("cat", color="blue"))
    assert verdict([at("dog", 0, 0, color="red"), at("cat", 20, 0, color="blue")], both).correct
    assert not verdict([at("dog", 0, 0, color="blue"), at("cat", 20, 0, color="red")], both).correct


def test_verdict_does_not_accept_an_object_without_a_color():
    assert not verdict(dogs(1), asked("colors", clause("dog", color="red"))).correct


@pytest.mark.parametrize(("first", "second", "correct"), [("red", "blue", False), ("blue", "red", True)])
def test_the_later_of_two_objects_with_equal_scores_ranks_first(first: str, second: str, correct: bool):
    """What the original answers: ``np.argsort(scores)[::-1]`` of two equal scores is ``[1, 0]``."""
    found = [at("dog", 0, 0, 0.9, first), at("cat", 40, 0, 0.9, first), at("dog", 20, 0, 0.9, second)]
    assert verdict(found, asked("colors", clause("dog", color="red"))).correct is correct


def test_equal_scores_rank_from_the_last_to_the_first_in_a_class_of_many():
    """The original's order with its own NumPy, for as many objects of a class as it sorts by insertion."""
    found = dogs(16, score=0.95)
    ranked = counted(found, asked("single_object", clause("dog")), Rules(max_per_class=5))
    assert ranked == {"dog": found[:10:-1]}


@pytest.mark.parametrize("tag", ["single_object", "counting"])
def test_a_float32_score_equal_to_the_threshold_does_not_count(tag: str):
    """In float64 the float32 next to 0.3 is greater than 0.3; the original compares in float32."""
    rules = Rules(counting_threshold=0.3)
    assert not verdict(dogs(1, score=float(np.float32(0.3))), asked(tag, clause("dog")), rules).correct


# Positions.


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (30, 0, {"right of"}),
        (-30, 0, {"left of"}),
        (0, 30, {"below"}),
        (0, -30, {"above"}),
        (30, 30, {"right of", "below"}),
        (-30, -30, {"left of", "above"}),
        (0, 0, set()),
        (1.9, 1.9, set()),
    ],
)
def test_relations_follow_the_offset_with_y_down(x: float, y: float, expected: set[str]):
    assert relations(at("dog", x, y).box, at("cat", 0, 0).box) == expected


def test_relations_shorten_the_offset_by_a_tenth_of_the_summed_sizes():
    """Two objects of size 10: an offset of 4 leaves (4 - 2) / 4 = 0.5, which is not enough."""
    landmark = at("cat", 0, 0).box
    assert relations(at("dog", 4, 0).box, landmark) == set()
    assert relations(at("dog", 4.1, 0).box, landmark) == {"right of"}


def test_relations_take_the_threshold_as_an_argument():
    assert relations(at("dog", 4, 0).box, at("cat", 0, 0).box, position_threshold=0.0) == {"right of"}


def test_relations_ignore_offsets_below_a_thousandth_of_a_pixel():
    boxes = at("dog", 5e-4, 0, size=0).box, at("cat", 0, 0, size=0).box
    assert relations(*boxes) == set()


def test_verdict_needs_the_relation_asked_for():
    assert verdict([at("cat", 0, 0), at("dog", 30, 0)], DOG_RIGHT_OF_CAT).correct
    wrong = verdict([at("cat", 0, 0), at("dog", 0, 30)], DOG_RIGHT_OF_CAT)
    assert wrong == Verdict(False, "expected dog right of cat, found below")


def test_verdict_without_the_landmark_says_so():
    assert verdict(dogs(1), DOG_RIGHT_OF_CAT).reason.splitlines() == [
        "expected 1 cat, found 0",
        "no landmark for dog to be right of",
    ]


def test_verdict_places_the_most_confident_objects_only():
    found = [at("cat", 0, 0), at("dog", -30, 0, 0.8), at("dog", 30, 0, 0.9)]
    assert verdict(found, DOG_RIGHT_OF_CAT).correct
    assert not verdict([found[0], at("dog", -30, 0, 0.99), found[2]], DOG_RIGHT_OF_CAT).correct


def test_verdict_needs_the_relation_between_all_pairs():
    two_cats = asked("position", clause("cat", 2), clause("dog", position=["right of", 0]))
    assert verdict([at("cat", 0, 0), at("cat", 5, 0), at("dog", 30, 0)], two_cats).correct
    assert not verdict([at("cat", 0, 0), at("cat", 60, 0), at("dog", 30, 0)], two_cats).correct


def test_verdict_does_not_depend_on_the_order_of_detections():
    found = [at("cat", 0, 0, 0.7), at("dog", -30, 0, 0.8), at("dog", 30, 0, 0.9), at("cat", 50, 0, 0.6)]
    assert all(verdict(order, DOG_RIGHT_OF_CAT).correct for order in permutations(found))


def test_rules_do_not_import_torch():
    code = "import sys, gdmd_lightning.geneval.rules; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


VERDICTS = Path(__file__).with_name("verdicts.jsonl.gz")
"""Random detections over the official prompts, each with the verdict of djghosh13/geneval's ``evaluate_images.py``."""


def test_verdicts_are_those_of_the_official_evaluator():
    with gzip.open(VERDICTS, "rt", encoding="utf-8") as lines:
        cases = [json.loads(line) for line in lines]
    assert len(cases) == 1000
    assert 200 < sum(case["correct"] for case in cases) < 800
    for case in cases:
        found = [Detection(d["label"], tuple(d["box"]), d["score"], d["color"]) for d in case["detections"]]
        assert verdict(found, case["metadata"]).correct == case["correct"], case
