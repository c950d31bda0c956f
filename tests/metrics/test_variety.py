"""Diversity and free choices, on pictures whose answer is known."""

import pytest
import torch
from torch import Tensor

from gdmd_lightning.geneval.rules import Detection
from gdmd_lightning.metrics.variety import free_colors, pairwise_distance, unevenness
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.studies.contestants import Contestant
from gdmd_lightning.studies.watch import Watch


def test_pairwise_distance_of_flat_pictures_is_the_mean_difference_of_their_grays():
    grays = torch.tensor([[0.0, 0.5, 1.0], [0.3, 0.3, 0.3]])
    images = grays[:, :, None, None, None].expand(2, 3, 3, 4, 4)
    assert pairwise_distance(images).tolist() == pytest.approx([(0.5 + 0.5 + 1) / 3, 0])


def test_pairwise_distance_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples"):
        pairwise_distance(torch.zeros(2, 1, 3, 4, 4))


class Painted:
    """Finds one object in each picture, whose color the first pixel says."""

    def detect(self, images, prompts):
        return [[Detection("circle", (0, 0, 1, 1), 1.0, "rgb"[int(image[0, 0, 0])])] for image in images]


def test_free_colors_counts_only_prompts_that_name_no_color():
    images = torch.tensor([0.0, 1.0, 1.0])[:, None, None, None].expand(3, 3, 2, 2)
    free, red = {"include": [{"class": "circle"}]}, {"include": [{"class": "circle", "color": "r"}]}
    counts = free_colors(images, [Prompt("", free), Prompt("", red), Prompt("", free)], Painted(), "rgb")
    assert counts.tolist() == [[1, 0, 0], [0, 1, 0]]


def test_unevenness_is_the_total_variation_from_equal_shares():
    assert unevenness(torch.tensor([[1.0, 1, 1, 1]])).item() == 0
    assert unevenness(torch.tensor([[4.0, 0, 0, 0]])).item() == pytest.approx(0.75)
    assert unevenness(torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 2]])).item() == pytest.approx((0.5 + 0) / 2 + 0.25)
    assert unevenness(torch.zeros(2, 4)).item() == 0


def contestant(generate) -> Contestant:
    return Contestant("test", 4, (1, 2, 2), generate, lambda images: images[:, :1] * 3)


def test_watch_measures_a_collapsed_and_a_diverse_generator():
    def collapsed(noise: Tensor, texts: list[str]) -> Tensor:
        return torch.full((len(noise), 3, 32, 32), 0.5)

    def diverse(noise: Tensor, texts: list[str]) -> Tensor:
        return noise.flatten(1)[:, :1, None, None].sigmoid().expand(-1, 3, 32, 32)

    watch = Watch(per_task=1, samples=3)
    assert watch(contestant(collapsed))["diversity"].mean == 0
    found = watch(contestant(diverse))["diversity"]
    assert found.mean > 0.1
    assert found.low < found.mean < found.high


def test_watch_reports_the_spread_of_latents():
    def checkered(noise: Tensor, texts: list[str]) -> Tensor:
        board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
        return board.float().expand(len(noise), 3, 32, 32)

    found = Watch(per_task=1, samples=2)(contestant(checkered))["latent_std"]
    assert found.mean == pytest.approx(1.5, rel=1e-3)  # latents are 0 or 3
