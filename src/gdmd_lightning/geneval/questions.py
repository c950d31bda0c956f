"""GenEval 2's prompts: a question for each atom of a prompt, with the answer that a fitting picture gives.

Source: GenEval 2 (2512.16853); facebookresearch/GenEval2, ``geneval2_data.jsonl`` and ``evaluation.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt

SKILLS = ("object", "attribute", "count", "position", "verb")
KEYS = ("prompt", "atom_count", "vqa_list", "skills", "tag")
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
YES = "Yes"
COUNTING = "How many"
"""A question that begins with it is answered by a number, any other one by yes."""
REMEDY = "use prompts: PATH/geneval2_data.jsonl of github.com/facebookresearch/GenEval2"


@dataclass(frozen=True)
class Question:
    """A question about a picture.

    Args:
        text: The question.
        answer: Its right answer: ``Yes``, or a number of :data:`NUMBERS`.
        skill: What it tests, one of :data:`SKILLS`.
    """

    text: str
    answer: str
    skill: str

    @property
    def spellings(self) -> tuple[str, ...]:
        """The answer as a model may write it; the probabilities of all are added."""
        if not self.text.startswith(COUNTING):
            return "Yes", "yes", " yes", " Yes"
        digits = str(NUMBERS.index(self.answer) + 1)
        word, capital = self.answer, self.answer.capitalize()
        return word, capital, f" {word}", f" {capital}", digits, f" {digits}"


def questions_of(prompt: Prompt) -> tuple[Question, ...]:
    """The questions of a prompt that :func:`check_questions` has accepted."""
    pairs = zip(prompt.metadata["vqa_list"], prompt.metadata["skills"], strict=True)
    return tuple(Question(text, answer, skill) for (text, answer), skill in pairs)


def check_questions(prompts: Sequence[Prompt], where: str) -> None:
    """Check that prompts carry GenEval 2's questions.

    Args:
        prompts: The prompts.
        where: Who needs the questions, for the message.

    Raises:
        UserError: If a prompt has none, or something that cannot be judged; the message names the first such prompt.
    """
    for prompt in prompts:
        if "vqa_list" not in prompt.metadata:
            raise UserError(f"prompt {prompt.text!r} has no GenEval 2 questions", where=where, remedy=REMEDY)
        if problem := _problem(prompt.metadata):
            what, remedy = problem
            raise UserError(f"in the GenEval 2 metadata of prompt {prompt.text!r} {what}", where=where, remedy=remedy)


def _problem(metadata: Mapping[str, Any]) -> tuple[str, str] | None:
    """What is wrong with a prompt's metadata, and what would be right."""
    if unknown := sorted(metadata.keys() - set(KEYS)):
        return f"there is an unknown key {unknown[0]!r}", f"use {', '.join(KEYS)}"
    pairs, skills, atoms = metadata["vqa_list"], metadata.get("skills"), metadata.get("atom_count", 1)
    if not isinstance(pairs, list) or not pairs:
        return f"vqa_list is {pairs!r}", "use a list of [question, answer]"
    if not isinstance(skills, list) or len(skills) != len(pairs):
        return f"skills is {skills!r}", f"use a list of one skill for each of {len(pairs)} questions"
    if isinstance(atoms, bool) or not isinstance(atoms, int) or atoms < 1:
        return f"atom_count is {atoms!r}", "use an integer of at least 1"
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(x, str) and x.strip() for x in pair):
            return f"a question is {pair!r}", "use [question, answer]"
        right = NUMBERS if pair[0].startswith(COUNTING) else (YES,)
        if pair[1] not in right:
            return f"the answer to {pair[0]!r} is {pair[1]!r}", f"use {' or '.join(right)}"
    for skill in skills:
        if skill not in SKILLS:
            return f"a skill is {skill!r}", f"use one of {', '.join(SKILLS)}"
    return None
