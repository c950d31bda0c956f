"""The judge: latents to rewards, whole or in micro-batches, with the reward model where it was asked to be."""

import threading

import pytest
import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.metrics.scores import RewardScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.rewards.judge import Judge

LATENTS = torch.randn(5, 2, 3, 4, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt(str(i)) for i in range(5)]


class Doubling:
    """Decodes latents to images of twice their values."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def decode(self, latents: Tensor) -> Tensor:
        self.batches.append(len(latents))
        return 2 * latents


class Placed(Reward):
    """Adds the prompt's number to the images' mean; notes where it is moved."""

    name = "placed"
    differentiable = True

    def __init__(self) -> None:
        self.moves: list[str] = []

    def to(self, device: torch.device) -> None:
        self.moves.append(str(device))

    def score(self, images: Tensor, prompts) -> Tensor:
        self.moves.append("score")
        return images.mean((1, 2, 3)) + torch.tensor([float(p.text) for p in prompts], device=images.device)

    def check(self, prompts) -> None:
        raise AssertionError(prompts[0].text)


def expected() -> Tensor:
    return 2 * LATENTS.mean((1, 2, 3)) + torch.arange(5)


def test_judge_scores_decoded_latents_with_their_prompts():
    torch.testing.assert_close(Judge(Placed(), Doubling())(LATENTS, PROMPTS), expected())


@pytest.mark.parametrize(("size", "batches"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_judge_in_micro_batches_gives_the_same_rewards(size, batches):
    family = Doubling()
    torch.testing.assert_close(Judge(Placed(), family, micro_batch_size=size)(LATENTS, PROMPTS), expected())
    assert family.batches == batches


def test_judge_carries_no_gradient_unless_requested():
    latents = LATENTS.clone().requires_grad_()
    assert not Judge(Placed(), Doubling())(latents, PROMPTS).requires_grad


def test_judge_with_gradient_keeps_it_through_the_decoder():
    latents = LATENTS.clone().requires_grad_()
    Judge(Placed(), Doubling(), micro_batch_size=2)(latents, PROMPTS, gradient=True).sum().backward()
    torch.testing.assert_close(latents.grad, torch.full_like(LATENTS, 2 / 24))


@pytest.mark.parametrize(
    ("placement", "moves"),
    [("accelerator", ["meta", "score"]), ("offloaded", ["meta", "score", "cpu"]), ("cpu", ["score"])],
)
def test_judge_places_the_reward(placement, moves):
    reward = Placed()
    with Judge(reward, Doubling(), placement)._placed(torch.device("meta")):
        reward.moves.append("score")
    assert reward.moves == moves


def test_judge_check_asks_the_reward():
    with pytest.raises(AssertionError, match="3"):
        Judge(Placed(), Doubling()).check([Prompt("3")])


# Pictures that are not finite.


class Blind(Placed):
    """Grades any picture with 1."""

    def score(self, images: Tensor, prompts) -> Tensor:
        return torch.ones(len(images))


class Touchy(Placed):
    """Fails on pictures that are not finite."""

    def score(self, images: Tensor, prompts) -> Tensor:
        if not images.isfinite().all():
            raise ValueError("autodetected range is not finite")
        return images.mean((1, 2, 3))


class Overflowing(Doubling):
    """Decodes large latents to NaN."""

    def decode(self, latents: Tensor) -> Tensor:
        images = super().decode(latents)
        return torch.where(latents.amax((1, 2, 3), keepdim=True) > 1000, images * float("nan"), images)


@pytest.mark.parametrize("reward", [Blind(), Touchy(), Placed(), CombinedReward([Blind(), Blind()], [1, 1])])
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("gradient", [False, True])
def test_judge_blames_the_generator_for_latents_that_are_not_finite(reward, size, gradient):
    latents = LATENTS.clone()
    latents[3, 0, 1, 2] = float("nan")
    count = 5 if gradient or size is None else 2
    expected = f"generator: 1 of {count} pictures are not finite, the first with prompt '3'; its latents are not"
    with pytest.raises(UserError, match=expected):
        Judge(reward, Doubling(), "cpu", size)(latents, PROMPTS, gradient=gradient)


@pytest.mark.parametrize("reward", [Blind(), Touchy(), Placed()])
def test_judge_blames_the_autoencoder_for_finite_latents(reward):
    latents = LATENTS.clone()
    latents[1:3] = 2000.0
    expected = "autoencoder: 2 of 5 pictures are not finite, the first with prompt '1'; its latents are finite; set "
    with pytest.raises(UserError, match=expected):
        Judge(reward, Overflowing(), "cpu")(latents, PROMPTS)


def test_metrics_refuse_pictures_that_are_not_finite():
    images = torch.rand(2, 3, 4, 4)
    images[1, 0, 0, 0] = float("inf")
    with pytest.raises(UserError, match="decoded pictures: 1 of 2 pictures are not finite, the first with prompt '1'"):
        RewardScore(Blind()).judge(images, PROMPTS[:2])


class Size(Placed):
    """The images' mean square."""

    def score(self, images: Tensor, prompts) -> Tensor:
        return images.square().mean((1, 2, 3))


@pytest.mark.parametrize("size", [None, 2])
def test_judge_gives_the_parts_of_a_combined_reward_and_decodes_once(size):
    nested = CombinedReward([Placed(), CombinedReward([Size(), Placed()], [0.5, 2.0])], [1.0, -3.0])
    family = Doubling()
    judge = Judge(nested, family, micro_batch_size=size)
    found = judge.each(LATENTS, PROMPTS)
    square = (2 * LATENTS).square().mean((1, 2, 3))
    torch.testing.assert_close(found, torch.stack([expected(), square, expected()], dim=1))
    assert judge.weights == (1.0, -1.5, -6.0)
    assert sum(family.batches) == 5
    torch.testing.assert_close(judge(LATENTS, PROMPTS), found @ torch.tensor(judge.weights))


def test_judge_of_a_plain_reward_has_one_part():
    judge = Judge(Placed(), Doubling())
    assert judge.weights == (1.0,)
    assert torch.equal(judge.each(LATENTS, PROMPTS)[:, 0], judge(LATENTS, PROMPTS))


class Clipping(Doubling):
    """Decodes as the families do: to [0, 1]."""

    def decode(self, latents: Tensor) -> Tensor:
        return super().decode(latents).clamp(0, 1)


def test_judge_refuses_a_gradient_that_no_pixel_lets_through():
    far = torch.where(LATENTS > 0, 3.0, -3.0)
    judge = Judge(Placed(), Clipping())
    judge(far, PROMPTS)
    with pytest.raises(UserError, match=r"reward 'placed': every pixel is 0 or 1, where the decoder clips"):
        judge(far.clone().requires_grad_(), PROMPTS, gradient=True)
    far[0, 0, 0, 0] = 0.1
    assert Judge(Placed(), Clipping())(far.clone().requires_grad_(), PROMPTS, gradient=True).requires_grad


def test_judge_looks_at_the_first_pictures_with_gradient_only():
    judge = Judge(Placed(), Clipping())
    judge(LATENTS.clone().requires_grad_(), PROMPTS, gradient=True)
    judge(torch.full_like(LATENTS, 3.0).requires_grad_(), PROMPTS, gradient=True)


class Elsewhere(Placed):
    """Notes in which thread and precision it is asked, and whether gradient is kept."""

    def score(self, images: Tensor, prompts) -> Tensor:
        kept = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
        self.moves.append((threading.current_thread() is threading.main_thread(), *kept))
        return super().score(images, prompts)


class Patient(Placed):
    """Answers only when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = threading.Event(), threading.Event()

    def score(self, images: Tensor, prompts) -> Tensor:
        self.asked.set()
        assert self.go_on.wait(20)
        return super().score(images, prompts)


@pytest.mark.parametrize(("size", "batches"), [(2, [2, 2, 1]), (None, [5])])
def test_scores_ahead_are_those_of_each(size, batches):
    family = Doubling()
    judge = Judge(CombinedReward([Placed(), Placed()], [1.0, 2.0]), family, micro_batch_size=size)
    with judge.ahead(LATENTS, PROMPTS) as answer:
        assert family.batches == batches
        found = answer()
    assert torch.equal(judge.logs()["reward/placed"], found[:, 0].mean())
    assert torch.equal(found, judge.each(LATENTS, PROMPTS))
    torch.testing.assert_close(judge.combined(found), 3 * expected())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_reward_ahead_is_asked_as_it_would_be_here(dtype):
    here, there = Elsewhere(), Elsewhere()
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        Judge(here, Doubling()).each(LATENTS, PROMPTS)
        with Judge(there, Doubling()).ahead(LATENTS, PROMPTS) as answer:
            answer()
    assert here.moves[1] == (True, *there.moves[1][1:])
    assert there.moves[1][:3] == (False, False, dtype is not None)


def test_reward_ahead_is_asked_while_the_caller_goes_on():
    reward = Patient()
    with Judge(reward, Doubling(), micro_batch_size=2).ahead(LATENTS, PROMPTS) as answer:
        assert reward.asked.wait(20)
        reward.go_on.set()
        torch.testing.assert_close(answer()[:, 0], expected())


def test_caller_that_fails_asks_no_more():
    reward = Patient()

    def fail() -> None:
        with Judge(reward, Doubling(), micro_batch_size=1).ahead(LATENTS, PROMPTS):
            assert reward.asked.wait(20)
            threading.Timer(0.2, reward.go_on.set).start()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert reward.moves.count("score") == 1
