"""Prompts of the measurement of diversity."""

import pytest

from gdmd_lightning.callbacks.variety import GenerationVariety
from gdmd_lightning.errors import UserError


@pytest.fixture
def drawbench(tmp_path):
    """Four prompts of two categories, whose column has another name."""
    file = tmp_path / "drawbench.csv"
    file.write_text("Prompts,Category\na cat,Animals\na dog,Animals\na red car,Colors\na blue car,Colors\n")
    return str(file)


def texts(source, **options):
    return [prompt.text for prompt in GenerationVariety(source, **options).prompts]


def test_variety_reads_the_column_that_is_named(drawbench):
    assert texts(drawbench, column="Prompts", count=2) == ["a cat", "a dog"]


def test_variety_spreads_prompts_with_a_tag(drawbench):
    assert texts(drawbench, column="Prompts", tag="Category", count=2) == ["a cat", "a red car"]


def test_variety_takes_the_split_of_a_data_set(monkeypatch):
    asked = {}

    def read(source, count, **options):
        asked.update(options)
        return []

    monkeypatch.setattr("gdmd_lightning.callbacks.variety.read_evaluation_prompts", read)
    GenerationVariety("someone/prompts", split="test")
    assert asked == {"column": "prompt", "split": "test", "tag": None}


def test_variety_refuses_a_column_that_is_not_there(drawbench):
    with pytest.raises(UserError, match=r"drawbench\.csv:1: no column 'prompt'; it has 'Prompts', 'Category'"):
        GenerationVariety(drawbench)
