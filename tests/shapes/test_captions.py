"""Captions: the contents of each task and the split into training and test prompts."""

import random
from collections import Counter

import pytest

from gdmd_lightning.shapes.captions import (
    TASK_WEIGHTS,
    TASKS,
    WORDS,
    Split,
    contents,
    corrupt,
    describe,
    evaluation_prompts,
    prompt_at,
    prompts,
)

SPLITS: tuple[Split, ...] = ("train", "test")
every_task = pytest.mark.parametrize("task", TASKS)


def texts(task: str, split: Split) -> set[str]:
    return {prompt.text for prompt in prompts(task, split)}


def captions(task: str, split: Split) -> set[str]:
    return {describe(prompt.metadata) for prompt in prompts(task, split)}


@every_task
def test_splits_of_a_task_share_no_prompt(task: str) -> None:
    assert not texts(task, "train") & texts(task, "test")


def test_splits_share_no_prompt_across_tasks() -> None:
    train, test = (set().union(*(texts(task, split) for task in TASKS)) for split in SPLITS)
    assert not train & test


@pytest.mark.parametrize("task", ["position", "color_attr"])
def test_splits_share_no_content_in_tasks_with_many(task: str) -> None:
    assert not captions(task, "train") & captions(task, "test")


@every_task
def test_test_split_is_a_quarter(task: str) -> None:
    held_out, total = len(texts(task, "test")), len(texts(task, "train") | texts(task, "test"))
    assert 0.2 <= held_out / total <= 0.25


@every_task
def test_splits_cover_every_content(task: str) -> None:
    assert captions(task, "train") | captions(task, "test") == {describe(content) for content in contents(task)}


@every_task
def test_contents_have_distinct_captions(task: str) -> None:
    described = [describe(content) for content in contents(task)]
    assert len(set(described)) == len(described)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_prompts_use_only_known_words(task: str, split: Split) -> None:
    assert {word for text in texts(task, split) for word in text.split()} <= set(WORDS)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_metadata_matches_the_text(task: str, split: Split) -> None:
    for prompt in prompts(task, split):
        assert prompt.text.endswith(describe(prompt.metadata))
        assert prompt.metadata["prompt"] == prompt.text
        assert prompt.metadata["tag"] == task


def test_position_metadata_puts_the_landmark_first() -> None:
    content = next(c for c in contents("position") if describe(c) == "a circle left of a square")
    assert [clause["class"] for clause in content["include"]] == ["square", "circle"]
    assert content["include"][1]["position"] == ["left of", 0]


def test_counting_metadata_excludes_one_more() -> None:
    for content in contents("counting"):
        (clause,) = content["include"]
        assert content["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]


def test_evaluation_prompts_are_balanced_test_prompts() -> None:
    chosen = evaluation_prompts(100)
    assert Counter(prompt.metadata["tag"] for prompt in chosen) == dict.fromkeys(TASKS, 100)
    assert {prompt.text for prompt in chosen} <= set().union(*(texts(task, "test") for task in TASKS))


def test_evaluation_prompts_repeat_in_turn() -> None:
    for task in TASKS:
        times = Counter(prompt.text for prompt in evaluation_prompts(100) if prompt.metadata["tag"] == task)
        assert len(times) == min(100, len(prompts(task, "test")))
        assert max(times.values()) - min(times.values()) <= 1


def test_evaluation_prompts_start_the_same_for_every_count() -> None:
    few, many = evaluation_prompts(3), evaluation_prompts(10)
    assert few == [prompt for start in range(0, 60, 10) for prompt in many[start : start + 3]]


@pytest.mark.parametrize("split", SPLITS)
def test_prompt_at_depends_on_seed_and_split(split: Split) -> None:
    one, same, other = ([prompt_at(split, seed, row).text for row in range(50)] for seed in (0, 0, 1))
    assert one == same != other
    assert set(one) <= set().union(*(texts(task, split) for task in TASKS))


def test_prompt_at_draws_tasks_by_their_weights() -> None:
    drawn = Counter(prompt_at("train", 0, row).metadata["tag"] for row in range(6000))
    for task, weight in TASK_WEIGHTS.items():
        assert drawn[task] / 6000 == pytest.approx(weight / sum(TASK_WEIGHTS.values()), abs=0.02)


@every_task
def test_corrupt_changes_the_caption(task: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        for content in contents(task):
            assert describe(corrupt(content, rng)) != describe(content)


@every_task
def test_corrupt_does_not_modify_its_argument(task: str) -> None:
    for content in contents(task):
        before = describe(content), str(content)
        corrupt(content, random.Random(0))
        assert (describe(content), str(content)) == before


@every_task
def test_corrupt_changes_one_clause(task: str) -> None:
    rng = random.Random(0)
    for content in contents(task) * 5:
        wrong = corrupt(content, rng)
        pairs = zip(content["include"], wrong["include"], strict=True)
        assert sum(clause != other for clause, other in pairs) == 1


def test_corrupt_count_excludes_one_more() -> None:
    rng = random.Random(0)
    for content in contents("counting") * 5:
        wrong = corrupt(content, rng)
        (clause,) = wrong["include"]
        assert wrong["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]


def test_tokenizer_has_one_token_per_word() -> None:
    from gdmd_lightning.shapes.pipeline import MAX_TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    all_texts = [text for task in TASKS for split in SPLITS for text in sorted(texts(task, split))]
    lengths = [len(ids) for ids in tokenizer(all_texts).input_ids]
    assert lengths == [len(text.split()) + 2 for text in all_texts]
    assert max(lengths) == 11 < MAX_TOKENS


def test_tokenizer_has_the_ids_of_the_shipped_one() -> None:
    from transformers import CLIPTokenizer

    from gdmd_lightning.locations import resolve
    from gdmd_lightning.shapes.pipeline import build_tokenizer

    tokenizer, shipped = build_tokenizer(), CLIPTokenizer.from_pretrained(resolve("package:assets/shapes/tokenizer"))
    assert tokenizer.get_vocab() == shipped.get_vocab()
    assert tokenizer(["a red circle", "Zebras, too"]).input_ids == shipped(["a red circle", "Zebras, too"]).input_ids
    assert len(tokenizer("a " * 20, truncation=True).input_ids) == 12
