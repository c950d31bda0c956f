"""GenEval 2's metadata and Soft-TIFA, apart from any model."""

import json

import pytest
import torch

from gdmd_lightning.data.readers import open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.questions import Question, check_questions, questions_of
from gdmd_lightning.geneval.soft_tifa import answer_log_probability, soft_tifa
from gdmd_lightning.prompts import Prompt

ROW = {
    "prompt": "two red circles",
    "atom_count": 3,
    "vqa_list": [
        ["How many circles are in the image?", "two"],
        ["Are the circles red?", "Yes"],
        ["Are there any circles in the image?", "Yes"],
    ],
    "skills": ["count", "attribute", "object"],
}


def refusal(**changed: object) -> str:
    with pytest.raises(UserError) as caught:
        check_questions([Prompt("good", ROW), Prompt("two red circles", {**ROW, **changed})], "score 'geneval2'")
    return str(caught.value)


def test_a_published_line_becomes_its_questions(tmp_path):
    path = tmp_path / "geneval2_data.jsonl"
    path.write_text(json.dumps(ROW) + "\n")
    (prompt,) = open_source(str(path), tag="atom_count").read()
    check_questions([prompt], "score 'geneval2'")
    assert prompt.metadata["tag"] == "3"
    assert questions_of(prompt) == (
        Question("How many circles are in the image?", "two", "count"),
        Question("Are the circles red?", "Yes", "attribute"),
        Question("Are there any circles in the image?", "Yes", "object"),
    )


def test_answers_are_accepted_in_the_spellings_of_the_original():
    count, yes, _ = questions_of(Prompt("two red circles", ROW))
    assert count.spellings == ("two", "Two", " two", " Two", "2", " 2")
    assert yes.spellings == ("Yes", "yes", " yes", " Yes")
    assert Question("How many dogs?", "ten", "count").spellings[4:] == ("10", " 10")


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"skill": []}, "there is an unknown key 'skill'; use prompt, atom_count, vqa_list, skills, tag"),
        ({"vqa_list": []}, "vqa_list is []; use a list of [question, answer]"),
        ({"skills": ["count"]}, "skills is ['count']; use a list of one skill for each of 3 questions"),
        ({"skills": ["count", "color", "object"]}, "a skill is 'color'; use one of object, attribute, count, "),
        ({"skills": ["count", ["x"], "object"]}, "a skill is ['x']; "),
        ({"atom_count": 0}, "atom_count is 0; use an integer of at least 1"),
        ({"atom_count": True}, "atom_count is True; "),
        ({"vqa_list": [["a?", "Yes"], ["b?"], ["c?", "Yes"]]}, "a question is ['b?']; use [question, answer]"),
        ({"vqa_list": [["a?", "Yes"], [2, "Yes"], ["c?", "Yes"]]}, "a question is [2, 'Yes']; use [question, answer]"),
        ({"vqa_list": [["a?", "Yes"], [" ", "Yes"], ["c?", "Yes"]]}, "a question is [' ', 'Yes']; "),
        ({"vqa_list": [["a?", "Yes"], ["b?", "No"], ["c?", "Yes"]]}, "the answer to 'b?' is 'No'; use Yes"),
        ({"vqa_list": [["How many?", "Yes"]] * 3}, "the answer to 'How many?' is 'Yes'; use one or two or three"),
        ({"vqa_list": [["How many?", "eleven"]] * 3}, "the answer to 'How many?' is 'eleven'; "),
    ],
)
def test_metadata_that_cannot_be_judged_is_one_line(changed, expected):
    start = "score 'geneval2': in the GenEval 2 metadata of prompt 'two red circles' "
    assert refusal(**changed).startswith(start + expected)


def test_prompt_without_questions_says_where_to_get_them():
    with pytest.raises(
        UserError, match=r"^reward 'x': prompt 'a' has no GenEval 2 questions; use prompts: PATH/geneval2"
    ):
        check_questions([Prompt("a")], "reward 'x'")


def test_answer_is_as_probable_as_its_spellings_together_even_where_they_share_a_token():
    logits = torch.tensor([0.1, 2.0, -1.0, 0.5])
    expected = logits.softmax(0)
    assert answer_log_probability(logits, [1, 3]).exp() == pytest.approx((expected[1] + expected[3]).item())
    assert answer_log_probability(logits, [1, 1]).exp() == pytest.approx(2 * expected[1].item())


def test_soft_tifa_is_the_mean_of_the_probabilities():
    p = torch.tensor([0.5, 0.125, 1.0])
    assert soft_tifa(p.log(), "arithmetic") == pytest.approx(1.625 / 3)
    assert soft_tifa(p.log(), "geometric") == pytest.approx(0.0625 ** (1 / 3))


def test_geometric_mean_of_improbable_answers_is_not_cut_to_zero():
    logits = torch.tensor([0.0, -200.0])
    assert soft_tifa(torch.stack([answer_log_probability(logits, [1])] * 2), "geometric").log() == -torch.inf
    assert soft_tifa(torch.stack([answer_log_probability(logits, [i]) for i in (0, 1)]), "geometric") == pytest.approx(
        float(torch.tensor(-100.0).exp()), rel=1e-4
    )
