"""GenEval's verdict as a reward: strict, or the share of what holds."""

import random

import pytest
import torch

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.grades import partial_score
from gdmd_lightning.geneval.rules import Detection, Rules, overlap, verdict
from gdmd_lightning.geneval.training_prompts import training_prompt
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import checked_score
from gdmd_lightning.rewards.geneval import GenEvalReward


def at(label, x, y, color=None, score=0.95):
    return Detection(label, (x - 5, y - 5, x + 5, y + 5), score, color)


class Seen(Detector):
    """Finds the same objects in every picture."""

    classes = ("cup", "dog")
    colors = ("red", "blue")

    def __init__(self, *objects):
        self.objects = list(objects)

    def detect(self, images, prompts):
        return [self.objects for _ in images]


TWO = {"tag": "two_object", "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1}]}
RED = {"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "red"}]}
LEFT = {
    "tag": "position",
    "include": [{"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
}
BLUE = {
    "tag": "x",
    "include": [
        {"class": "cup", "count": 2},
        {"class": "dog", "count": 1, "color": "blue", "position": ["left of", 0]},
    ],
}
THREE = {"tag": "counting", "include": [{"class": "cup", "count": 3}], "exclude": [{"class": "cup", "count": 4}]}


@pytest.mark.parametrize(
    ("metadata", "objects", "graded"),
    [
        (TWO, [at("cup", 0, 0)], 1 / 2),
        (TWO, [at("cup", 0, 0), at("dog", 9, 9)], 1),
        (TWO, [], 0),
        (RED, [at("cup", 0, 0, "red"), at("cup", 20, 0, "blue")], (1 + 1 / 2) / 2),
        (RED, [at("cup", 0, 0, "red")], (1 / 2 + 1 / 2) / 2),
        (LEFT, [at("cup", 50, 0), at("dog", 0, 0)], 1),
        (LEFT, [at("cup", 0, 0), at("dog", 50, 0)], 2 / 3),
        (BLUE, [at("cup", 50, 0), at("cup", 70, 0), at("dog", 0, 0, "blue")], 1),
        (BLUE, [at("cup", 50, 0), at("cup", -50, 0), at("dog", 0, 0, "blue")], (1 + 1 + 1 + 1 / 2) / 4),
        (BLUE, [at("cup", 50, 0), at("cup", 70, 0), at("dog", 0, 0, "red")], (1 + 1 + 0 + 1) / 4),
        (THREE, [at("cup", 20 * i, 0) for i in range(3)], 1),
        (THREE, [at("cup", 20 * i, 0) for i in range(4)], (1 + 3 / 4) / 2),
        (THREE, [at("cup", 20 * i, 0) for i in range(2)], (2 / 3 + 2 / 3) / 2),
    ],
)
def test_graded_reward_is_the_mean_share_of_the_requirements(metadata, objects, graded):
    prompts = [Prompt("text", metadata)] * 2
    for grading, expected in (("graded", graded), ("strict", float(graded == 1))):
        reward = GenEvalReward(Seen(*objects), grading)
        assert checked_score(reward, torch.rand(2, 3, 8, 8), prompts).tolist() == pytest.approx([expected] * 2)


def test_graded_reward_is_1_exactly_where_the_verdict_is_correct():
    draw, seen = random.Random(0), []
    for row in range(3000):
        metadata = training_prompt(0, row).metadata
        objects = []
        for clause in metadata["include"]:
            for _ in range(clause["count"] + draw.choice([-1, 0, 0, 0, 1])):
                color = clause.get("color") if draw.random() < 0.8 else "white"
                place = draw.uniform(0, 100), draw.uniform(0, 100)
                objects.append(at(clause["class"], *place, color, draw.choice([0.2, 0.95, 0.97])))
        for rules in (Rules(), Rules(color_first=True)):
            score = partial_score(objects, metadata, rules)
            assert 0 <= score <= 1
            correct = verdict(objects, metadata, rules).correct
            assert (score == pytest.approx(1)) == correct, (metadata, objects)
            seen.append(correct)
    assert 0.2 < sum(seen) / len(seen) < 0.8


def test_prompts_that_the_detector_cannot_judge_are_refused():
    reward = GenEvalReward(Seen())
    with pytest.raises(UserError, match=r"^reward 'geneval': prompt 'a cup' has no GenEval metadata"):
        reward.check([Prompt("a cup")])
    with pytest.raises(UserError, match="'zebra'"):
        reward.check([Prompt("a zebra", {"tag": "single_object", "include": [{"class": "zebra", "count": 1}]})])
    with pytest.raises(UserError, match="'mauve'"):
        reward.check([Prompt("text", {"include": [{"class": "cup", "count": 1, "color": "mauve"}]})])
    with pytest.raises(UserError, match=r"^reward\.grading: unknown grading 'soft'; use strict or graded"):
        GenEvalReward(Seen(), "soft")


def test_objects_that_overlap_a_more_confident_one_do_not_count_if_asked():
    objects = [at("cup", 0, 0, score=0.9), at("cup", 2, 0, score=0.8), at("cup", 40, 0, score=0.7)]
    assert overlap(objects[0].box, objects[1].box) == pytest.approx(9 * 11 / (2 * 121 - 99))
    assert overlap(objects[0].box, objects[2].box) == 0
    assert overlap(objects[0].box, at("cup", 0, 2).box) == pytest.approx(9 * 11 / (2 * 121 - 99))
    assert overlap(objects[0].box, at("cup", 0, 40).box) == 0
    three = {"tag": "x", "include": [{"class": "cup", "count": 3}]}
    assert verdict(objects, three).correct
    assert not verdict(objects, three, Rules(max_overlap=0.5)).correct
    assert verdict(objects, {"tag": "x", "include": [{"class": "cup", "count": 2}]}, Rules(max_overlap=0.5)).correct
    assert verdict(objects, three, Rules(max_overlap=0.8)).correct
