"""Checks of scores, and the shipped rewards on true and wrong captions."""

import inspect
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from gdmd_lightning import components
from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import PACKAGE
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward, checked_score
from gdmd_lightning.rewards.clip import ContrastiveReward
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.rewards.shapes import ShapesReward

PICTURES = torch.rand(4, 3, 8, 8)
PROMPTS = [Prompt(f"prompt {i}") for i in range(4)]


class Answer(Reward):
    name = "answer"

    def __init__(self, answer):
        self.answer = answer

    def score(self, images, prompts):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def test_checked_score_returns_finite_scores_as_float32():
    scores = checked_score(Answer(torch.arange(4, dtype=torch.float64)), PICTURES, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.zeros(3), r"'answer'.*\(3,\) for 4 pictures"),
        (torch.zeros(4, 1), r"\(4, 1\) for 4 pictures"),
        ([1.0, 2.0, 3.0, 4.0], "list for 4 pictures"),
        (torch.tensor([0, torch.nan, 0, torch.nan]), "nan for 2 of 4 pictures, the first with prompt 'prompt 1'"),
        (torch.tensor([0, 0, 0, torch.inf]), "inf for 1 of 4"),
        (ValueError("no such word"), "raised ValueError: no such word"),
    ],
)
def test_checked_score_reports_a_wrong_score_in_one_line(answer, message):
    with pytest.raises(UserError, match=message) as caught:
        checked_score(Answer(answer), PICTURES, PROMPTS)
    assert "\n" not in str(caught.value)


def test_checked_score_leaves_the_error_that_a_reward_raises_for_the_user():
    error = UserError("no answer", where="reward 'answer'")
    with pytest.raises(UserError) as caught:
        checked_score(Answer(error), PICTURES, PROMPTS)
    assert caught.value is error


def test_combined_reward_is_the_weighted_sum():
    parts = [Answer(torch.tensor([1.0, 2, 3, 4])), Answer(torch.ones(4))]
    assert checked_score(CombinedReward(parts, [2.0, -1.0]), PICTURES, PROMPTS).tolist() == [1, 3, 5, 7]


class Inverting(Answer):
    def score(self, images, prompts):
        return images.sub_(1).neg_().mean((1, 2, 3))


def test_combined_reward_shows_every_part_the_same_pictures():
    before = PICTURES.clone()
    combined = CombinedReward([Inverting(None), Inverting(None)], [1.0, -1.0])
    assert checked_score(combined, PICTURES, PROMPTS).tolist() == [0, 0, 0, 0]
    assert torch.equal(PICTURES, before)


def test_combined_reward_carries_gradient_to_the_pixels():
    pixels = PICTURES.clone().requires_grad_()

    class Mean(Answer):
        def score(self, images, prompts):
            return images.mean((1, 2, 3))

    checked_score(CombinedReward([Mean(None), Mean(None)], [1.0, 2.0]), pixels, PROMPTS).sum().backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 3 / (3 * 8 * 8)))


def test_combined_reward_names_the_failing_part():
    with pytest.raises(UserError, match="'answer'"):
        checked_score(CombinedReward([Answer(torch.zeros(3))], [1.0]), PICTURES, PROMPTS)


class Noted(Answer):
    def __init__(self):
        self.calls = []

    def check(self, prompts):
        self.calls.append(("check", prompts))

    def prepare(self):
        self.calls.append("prepare")

    def to(self, device):
        self.calls.append(device)

    def sketch(self):
        return torch.nn.Linear(1, 1, device="meta")


def test_combined_reward_checks_prepares_moves_and_sketches_all_its_parts():
    one, other, cpu = Noted(), Noted(), torch.device("cpu")
    combined = CombinedReward([one, Answer(None), other], [1.0, 1.0, 1.0])
    combined.check(PROMPTS)
    combined.prepare()
    combined.to(cpu)
    assert one.calls == other.calls == [("check", PROMPTS), "prepare", cpu]
    assert len(combined.sketch()) == 2


def test_combined_reward_needs_one_weight_per_reward():
    with pytest.raises(UserError, match="2 rewards and 1 weights"):
        CombinedReward([ShapesReward(), ShapesReward()], [1.0])


def test_every_reward_and_score_that_a_configuration_can_name_has_a_name_to_set():
    named = [getattr(components, name) for name in components.__all__]
    kinds = [kind for kind in named if isinstance(kind, type) and issubclass(kind, Reward | TaskScore)]
    assert len(kinds) > 12
    without = {kind.__name__ for kind in kinds if "name" not in inspect.signature(kind).parameters}
    assert without == {"RewardScore"}  # it has its reward's name


def test_shapes_and_combined_rewards_take_the_name_that_they_are_given():
    parts = [ShapesReward(), ShapesReward("other")]
    assert [part.name for part in parts] == ["shapes", "other"]
    assert CombinedReward(parts, [1.0, 1.0]).name == "shapes+other"
    assert CombinedReward(parts, [1.0, 1.0], "both").name == "both"


def test_shapes_reward_refuses_prompts_without_metadata():
    with pytest.raises(UserError, match="no GenEval metadata"):
        ShapesReward().check([Prompt("a red circle")])


def test_contrastive_reward_refuses_a_directory_without_a_config(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        ContrastiveReward(str(tmp_path))


def without(tensors):
    return {name: value for name, value in tensors.items() if name != "logit_scale"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (without, "1 missing, the first logit_scale"),
        (lambda tensors: {}, r"\d+ missing, the first "),
        (lambda tensors: {**tensors, "head.weight": torch.zeros(1)}, "1 unexpected, the first head.weight"),
    ],
    ids=["one missing", "empty", "one too many"],
)
def test_contrastive_reward_refuses_weights_that_are_not_the_models(tmp_path, change, expected):
    scorer = shutil.copytree(PACKAGE / "assets/shapes/scorer", tmp_path / "scorer")
    tensors = load_file(scorer / "model.safetensors")
    save_file(change(tensors), scorer / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=expected) as refused:
        ContrastiveReward(str(scorer)).score(PICTURES, PROMPTS)
    assert str(refused.value).startswith("reward 'contrastive': the weights in ")


def test_contrastive_reward_refuses_weights_of_another_size(tmp_path):
    scorer = shutil.copytree(PACKAGE / "assets/shapes/scorer", tmp_path / "scorer")
    tensors = load_file(scorer / "model.safetensors")
    tensors["text_projection.weight"] = torch.zeros(3, 3)
    save_file(tensors, scorer / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"reward 'contrastive': .*"):
        ContrastiveReward(str(scorer)).score(PICTURES, PROMPTS)


@pytest.fixture(scope="module")
def world():
    import random

    import numpy as np

    from gdmd_lightning.shapes.captions import prompt_at
    from gdmd_lightning.shapes.scenes import render, sample_scenes

    prompts = [prompt_at("test", 3, row) for row in range(200)]
    pictures = render(sample_scenes([p.metadata for p in prompts], np.random.default_rng(0)))
    shuffled = prompts[:]
    random.Random(0).shuffle(shuffled)
    return pictures, prompts, shuffled


def test_contrastive_reward_prefers_the_true_caption(world):
    pictures, prompts, shuffled = world
    scorer = ContrastiveReward("package:assets/shapes/scorer")
    true, other = checked_score(scorer, pictures, prompts), checked_score(scorer, pictures, shuffled)
    ends = zip((p.text.split()[-3:] for p in prompts), (p.text.split()[-3:] for p in shuffled), strict=True)
    different = torch.tensor([a != b for a, b in ends])
    assert (true > other)[different].float().mean() > 0.9
    assert true.abs().max() <= 1


def test_contrastive_reward_is_differentiable_in_pixels(world):
    pictures, prompts, _ = world
    scorer = ContrastiveReward("package:assets/shapes/scorer")
    pixels = pictures[:8].clone().requires_grad_()
    before = scorer.score(pixels, prompts[:8])
    before.sum().backward()
    assert scorer.differentiable
    direction = pixels.grad / pixels.grad.flatten(1).norm(dim=1)[:, None, None, None]
    stepped = scorer.score(pixels + 0.05 * direction, prompts[:8])
    assert (stepped > before).all()


def test_shapes_reward_is_high_for_true_captions_and_low_for_others(world):
    pictures, prompts, shuffled = world
    true, other = checked_score(ShapesReward(), pictures, prompts), checked_score(ShapesReward(), pictures, shuffled)
    assert true.mean() > 0.85
    assert other.mean() < 0.4
