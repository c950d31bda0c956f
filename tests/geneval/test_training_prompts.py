"""Training prompts in GenEval's form, and the official test prompts."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from gdmd_lightning.configuration import training
from gdmd_lightning.data.evaluation_prompts import read_evaluation_prompts
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.data.readers import open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.classes import CLASSES, COLORS, TASKS
from gdmd_lightning.geneval.metadata import check_metadata
from gdmd_lightning.geneval.training_prompts import (
    TEST_PROMPTS,
    all_training_prompts,
    number_of_contents,
    training_prompt,
)
from gdmd_lightning.studies.sampling import wanted_pictures

OFFICIAL = [json.loads(line) for line in TEST_PROMPTS.read_text(encoding="utf-8").splitlines()]
MANY = [training_prompt(0, row) for row in range(6000)]
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def content(metadata):
    """What a prompt asks for, whatever the order of its objects."""
    parts = [(c["class"], c["count"], c.get("color")) for c in metadata["include"]]
    for clause in metadata["include"]:
        if "position" in clause:
            relation, landmark = clause["position"]
            return frozenset(
                [(clause["class"], relation, metadata["include"][landmark]["class"]),
                 (metadata["include"][landmark]["class"], OPPOSITE[relation], clause["class"])]
            )  # fmt: skip
    return frozenset(parts)


def test_official_set_is_whole():
    counts = Counter(metadata["tag"] for metadata in OFFICIAL)
    assert counts == {
        "single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100,
    }  # fmt: skip


def test_training_prompts_ask_for_nothing_that_the_test_asks_for():
    texts = {metadata["prompt"] for metadata in OFFICIAL}
    contents = {content(metadata) for metadata in OFFICIAL if metadata["tag"] != "single_object"}
    for prompt in MANY:
        assert prompt.text not in texts
        assert prompt.metadata["tag"] == "single_object" or content(prompt.metadata) not in contents, prompt


def test_held_out_contents_are_not_all_contents():
    assert number_of_contents("colors") == 79 * 10 - len({content(m) for m in OFFICIAL if m["tag"] == "colors"})
    assert number_of_contents("counting") == 80 * 3 - len({content(m) for m in OFFICIAL if m["tag"] == "counting"})
    pairs = {"two_object": 80 * 79, "position": 80 * 79 * 4, "color_attr": 79 * 78 * 10 * 9}
    for task, contents in pairs.items():
        held_out = {content(m) for m in OFFICIAL if m["tag"] == task}
        assert number_of_contents(task) == contents - 2 * len(held_out)  # in both orders


def test_tasks_are_equally_frequent_and_prompts_do_not_repeat_before_all_were_used():
    assert set(Counter(prompt.metadata["tag"] for prompt in MANY).values()) == {1000}
    for task in ("two_object", "position", "color_attr"):
        texts = [prompt.text for prompt in MANY if prompt.metadata["tag"] == task]
        assert len(set(texts)) == 1000
    counting = [prompt.text for prompt in MANY if prompt.metadata["tag"] == "counting"]
    size = number_of_contents("counting")
    assert len(set(counting[:size])) == size
    assert set(counting[size : 2 * size]) == set(counting[:size]) != set()
    assert counting[size : 2 * size] != counting[:size]


def test_rows_depend_on_the_seed_only():
    assert training_prompt(0, 777) == MANY[777]
    assert [training_prompt(1, row) for row in range(12)] != MANY[:12]


def test_metadata_can_be_judged_and_says_what_the_text_says():
    check_metadata(MANY, "test", classes=CLASSES, colors=COLORS)
    for prompt in MANY[:600]:
        for clause in prompt.metadata["include"]:
            assert clause["class"] in prompt.text
            assert clause.get("color", "") in prompt.text
            assert clause["count"] == 1 or prompt.metadata["tag"] == "counting"
            if "position" in clause:
                relation, landmark = clause["position"]
                one, other = clause["class"], prompt.metadata["include"][landmark]["class"]
                assert prompt.text.index(one) < prompt.text.index(relation) < prompt.text.rindex(other)


def test_training_prompts_are_worded_as_the_official_ones():
    by_text = {metadata["prompt"]: metadata for metadata in OFFICIAL}
    for task, pattern in {"colors": "a photo of a", "counting": "a photo of ", "position": "a photo of a"}.items():
        official = [text for text, metadata in by_text.items() if metadata["tag"] == task]
        ours = [prompt.text for prompt in MANY if prompt.metadata["tag"] == task]
        assert all(text.startswith(pattern) for text in official + ours)


def test_source_geneval_trains_on_prompts_and_tests_on_the_official_ones():
    source = open_source("geneval", seed=3)
    assert list(islice(source.read(5), 2)) == [training_prompt(3, 5), training_prompt(3, 6)]
    official = list(open_source("geneval", split="test").read(0))
    assert [prompt.text for prompt in official] == [metadata["prompt"] for metadata in OFFICIAL]
    assert official[7].metadata["include"] == OFFICIAL[7]["include"]
    with pytest.raises(UserError, match=r"^geneval: no split 'dev'; its splits are train and test$"):
        open_source("geneval", split="dev")


def test_every_training_prompt_can_be_listed_once():
    listed = Counter(prompt.metadata["tag"] for prompt in islice(all_training_prompts(), 30_000))
    assert listed["counting"] == number_of_contents("counting")
    assert listed["two_object"] == number_of_contents("two_object")
    texts = [prompt.text for prompt in islice(all_training_prompts(), 1000)]
    assert len(set(texts)) == 1000
    data = PromptDataModule("geneval", batch_size=4, group_size=2)
    assert list(islice(data.texts(), 1000)) == texts


def test_fit_trains_on_geneval_prompts_and_resumes(fast_fit, tmp_path):
    source = ["--data.source=geneval", "--trainer.max_steps=1"]
    training.run([*fast_fit, *source])
    (last,) = tmp_path.rglob("last.ckpt")
    cli = training.run([*fast_fit, *source, f"--ckpt_path={last}", "--trainer.max_steps=2"])
    assert cli.model.updates == 2


def test_endless_prompts_are_sampled_only_with_a_count():
    with pytest.raises(UserError, match=r"^geneval: this source is endless; give the number of prompts with --count"):
        wanted_pictures("geneval", "prompt", "train", None, 1)
    assert len(list(wanted_pictures("geneval", "prompt", "test", None, 1))) == 553


def test_evaluation_takes_official_prompts_of_every_task():
    assert len(read_evaluation_prompts("geneval", 5000)) == 553
    few = read_evaluation_prompts("geneval", 24)
    assert len({prompt.text for prompt in few}) == 24
    assert {prompt.metadata["tag"] for prompt in few} == set(TASKS)


def test_shared_copy_of_the_official_set_has_its_license():
    assert "MIT" in Path(TEST_PROMPTS.parent / "LICENSE").read_text()
