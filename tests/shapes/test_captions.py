"""Captions: what the world can say, and what is kept for the test."""

import random
from collections import Counter
from itertools import islice

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
    prompt_stream,
    prompts,
)

SPLITS: tuple[Split, ...] = ("train", "test")
every_task = pytest.mark.parametrize("task", TASKS)


def texts(task: str, split: Split) -> set[str]:
    return {prompt.text for prompt in prompts(task, split)}


def captions(task: str, split: Split) -> set[str]:
    return {describe(prompt.metadata) for prompt in prompts(task, split)}


@every_task
def test_train_and_test_share_no_prompt(task: str) -> None:
    assert not texts(task, "train") & texts(task, "test")


def test_no_test_prompt_of_any_task_is_trained_on() -> None:
    train, test = (set().union(*(texts(task, split) for task in TASKS)) for split in SPLITS)
    assert not train & test


@pytest.mark.parametrize("task", ["position", "color_attr"])
def test_whole_contents_are_held_out_where_there_are_many(task: str) -> None:
    assert not captions(task, "train") & captions(task, "test")


@every_task
def test_a_quarter_is_held_out(task: str) -> None:
    held_out, all_of_it = len(texts(task, "test")), len(texts(task, "train") | texts(task, "test"))
    assert 0.2 <= held_out / all_of_it <= 0.25


@every_task
def test_every_content_is_asked_for_in_some_split(task: str) -> None:
    assert captions(task, "train") | captions(task, "test") == {describe(content) for content in contents(task)}


@every_task
def test_contents_have_distinct_captions(task: str) -> None:
    described = [describe(content) for content in contents(task)]
    assert len(set(described)) == len(described)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_every_word_is_a_word_of_the_world(task: str, split: Split) -> None:
    assert {word for text in texts(task, split) for word in text.split()} <= set(WORDS)


@every_task
@pytest.mark.parametrize("split", SPLITS)
def test_metadata_describes_its_own_text(task: str, split: Split) -> None:
    for prompt in prompts(task, split):
        assert prompt.text.endswith(describe(prompt.metadata))
        assert prompt.metadata["prompt"] == prompt.text
        assert prompt.metadata["tag"] == task


def test_a_relation_is_told_of_the_second_clause_to_the_first() -> None:
    content = next(c for c in contents("position") if describe(c) == "a circle left of a square")
    assert [clause["class"] for clause in content["include"]] == ["square", "circle"]
    assert content["include"][1]["position"] == ["left of", 0]


def test_an_exact_count_excludes_one_more() -> None:
    for content in contents("counting"):
        (clause,) = content["include"]
        assert content["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]


def test_evaluation_prompts_are_600_balanced_test_prompts() -> None:
    chosen = evaluation_prompts(100)
    assert Counter(prompt.metadata["tag"] for prompt in chosen) == dict.fromkeys(TASKS, 100)
    assert {prompt.text for prompt in chosen} <= set().union(*(texts(task, "test") for task in TASKS))


def test_evaluation_prompts_repeat_in_turn() -> None:
    for task in TASKS:
        times = Counter(prompt.text for prompt in evaluation_prompts(100) if prompt.metadata["tag"] == task)
        assert len(times) == min(100, len(prompts(task, "test")))
        assert max(times.values()) - min(times.values()) <= 1


def test_fewer_evaluation_prompts_are_the_first_of_more() -> None:
    few, many = evaluation_prompts(3), evaluation_prompts(10)
    assert few == [prompt for start in range(0, 60, 10) for prompt in many[start : start + 3]]


@pytest.mark.parametrize("split", SPLITS)
def test_a_stream_is_a_function_of_its_seed_and_split(split: Split) -> None:
    one, same, other = ([p.text for p in islice(prompt_stream(split, seed), 50)] for seed in (0, 0, 1))
    assert one == same != other
    assert set(one) <= set().union(*(texts(task, split) for task in TASKS))


def test_a_stream_draws_tasks_by_their_weights() -> None:
    drawn = Counter(prompt.metadata["tag"] for prompt in islice(prompt_stream("train", 0), 6000))
    for task, weight in TASK_WEIGHTS.items():
        assert drawn[task] / 6000 == pytest.approx(weight / sum(TASK_WEIGHTS.values()), abs=0.02)


@every_task
def test_a_corrupted_content_reads_differently(task: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        for content in contents(task):
            assert describe(corrupt(content, rng)) != describe(content)


@every_task
def test_corrupting_leaves_the_original_as_it_was(task: str) -> None:
    for content in contents(task):
        before = describe(content), str(content)
        corrupt(content, random.Random(0))
        assert (describe(content), str(content)) == before


@every_task
def test_one_clause_alone_is_corrupted(task: str) -> None:
    rng = random.Random(0)
    for content in contents(task) * 5:
        wrong = corrupt(content, rng)
        pairs = zip(content["include"], wrong["include"], strict=True)
        assert sum(clause != other for clause, other in pairs) == 1


def test_a_corrupted_count_excludes_one_more_of_its_own() -> None:
    rng = random.Random(0)
    for content in contents("counting") * 5:
        wrong = corrupt(content, rng)
        (clause,) = wrong["include"]
        assert wrong["exclude"] == [{"class": clause["class"], "count": clause["count"] + 1}]


def test_every_caption_fits_the_tokenizer_a_token_a_word() -> None:
    from gdmd_lightning.shapes.pipeline import MAX_TOKENS, build_tokenizer

    tokenizer = build_tokenizer()
    all_texts = [text for task in TASKS for split in SPLITS for text in sorted(texts(task, split))]
    lengths = [len(ids) for ids in tokenizer(all_texts).input_ids]
    assert lengths == [len(text.split()) + 2 for text in all_texts]
    assert max(lengths) == 11 < MAX_TOKENS
