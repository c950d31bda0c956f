"""Metadata that cannot be judged is refused with the prompt and the value."""

from typing import Any

import pytest

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.metadata import check_metadata
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.shapes.captions import evaluation_prompts

CIRCLE = {"class": "circle", "count": 1}


def test_the_test_prompts_of_shapes_pass():
    check_metadata(evaluation_prompts(3), "here")
    ShapesReward().check(evaluation_prompts(3))


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        (
            {},
            "prompt 'p' has no GenEval metadata; use data.source: shapes or geneval, or a .jsonl file ",
        ),
        ({"include": [CIRCLE], "tag": "countng"}, "tag is 'countng'; use one of single_object, two_object, counting, "),
        ({"include": []}, "include is []; use a list of clauses"),
        ({"include": "circle"}, "include is 'circle'; use a list of clauses"),
        ({"include": ["circle"]}, "a clause is 'circle'; use an object with 'class' and 'count'"),
        (
            {"include": [{**CIRCLE, "colour": "red"}]},
            "a clause of include has an unknown key 'colour'; use class, count, color, position",
        ),
        (
            {"include": [CIRCLE], "exclude": [{**CIRCLE, "color": "red"}]},
            "a clause of exclude has an unknown key 'color'; use class, count",
        ),
        ({"include": [{"count": 1}]}, "class is None; use a name"),
        ({"include": [{"class": "circle"}]}, "count is None; use an integer of at least 1"),
        ({"include": [{"class": "circle", "count": 0}]}, "count is 0; use an integer of at least 1"),
        ({"include": [{**CIRCLE, "color": 3}]}, "color is 3; use a name"),
        ({"include": [CIRCLE, {**CIRCLE, "position": ["near", 0]}]}, "position is ['near', 0]; use [relation, index "),
        ({"include": [CIRCLE, {**CIRCLE, "position": ["above", 2]}]}, "position is ['above', 2]; use [relation, "),
        ({"include": [CIRCLE, {**CIRCLE, "position": None}]}, "position is None; use [relation, "),
        ({"include": [CIRCLE], "exclude": [{"class": "square", "count": -1}]}, "count is -1; use an integer of "),
    ],
)
def test_check_metadata_names_the_prompt_and_the_value(metadata: dict[str, Any], expected: str):
    with pytest.raises(UserError) as error:
        check_metadata([Prompt("right", {"include": [CIRCLE]}), Prompt("p", metadata)], "here")
    start = "here: " if not metadata else "here: in the GenEval metadata of prompt 'p' "
    assert str(error.value).startswith(start + expected)


def test_shapes_reward_knows_its_classes_and_colors():
    for clause, expected in (
        ({**CIRCLE, "class": "bench"}, "class is 'bench'; use one of circle, square, triangle"),
        ({**CIRCLE, "color": "mauve"}, "color is 'mauve'; use one of "),
    ):
        check_metadata([Prompt("p", {"include": [clause]})], "here")
        with pytest.raises(UserError) as error:
            ShapesReward().check([Prompt("p", {"include": [clause]})])
        assert str(error.value).startswith(f"reward 'shapes': in the GenEval metadata of prompt 'p' {expected}")
