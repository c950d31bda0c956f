"""Diversity and the figures of a watch, on pictures whose answer is known."""

import numpy as np
import pytest
import torch
from torch import Tensor

from gdmd_lightning.metrics.variety import pairwise_distance
from gdmd_lightning.shapes.scenes import render, sample_scenes
from gdmd_lightning.studies.contestants import Contestant
from gdmd_lightning.studies.watch import WATCHED, Watch


def test_pairwise_distance_of_flat_pictures_is_the_mean_difference_of_their_grays():
    grays = torch.tensor([[0.0, 0.5, 1.0], [0.3, 0.3, 0.3]])
    images = grays[:, :, None, None, None].expand(2, 3, 3, 4, 4)
    assert pairwise_distance(images).tolist() == pytest.approx([(0.5 + 0.5 + 1) / 3, 0])


def test_pairwise_distance_needs_two_samples():
    with pytest.raises(ValueError, match="at least 2 samples"):
        pairwise_distance(torch.zeros(2, 1, 3, 4, 4))


def contestant(generate) -> Contestant:
    return Contestant("test", 4, (1, 2, 2), generate, lambda images: images[:, :1] * 3, generate, str(id(generate)))


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


def world(watch: Watch, seed: int = 0, **fixed):
    """A generator that draws the world's own scenes of the watch's prompts, with some of their properties fixed."""

    def generate(noise: Tensor, texts: list[str]) -> Tensor:
        contents = [next(p.metadata for p in watch.prompts if p.text == text) for text in texts]
        scenes = sample_scenes(contents, np.random.default_rng((seed, int(noise[0, 0, 0, 0] * 1e6) % 2**32)))
        for name, value in fixed.items():
            getattr(scenes, name)[:] = value
        return render(scenes)

    return contestant(generate)


def test_watch_finds_no_bias_in_the_world_itself_and_each_bias_where_it_is():
    watch = Watch(per_task=3, samples=6)
    fair = watch(world(watch))
    assert list(fair) == list(WATCHED)
    biased = {
        "color_bias": watch(world(watch, color=0)),
        "position_bias": watch(world(watch, center=16.0)),
        "size_bias": watch(world(watch, radius=3.2)),
    }
    for name, found in biased.items():
        assert fair[name].mean < 0.2
        assert found[name].low > fair[name].high + 0.2
        assert found[name].low <= found[name].mean <= found[name].high
    assert biased["color_bias"]["color_bias"].mean == pytest.approx(0.75, abs=0.03)


def test_a_generator_that_draws_nothing_is_as_far_from_the_truth_as_can_be():
    found = Watch(per_task=1, samples=2)(contestant(lambda noise, texts: torch.ones(len(noise), 3, 32, 32)))
    assert [found[name].mean for name in ("color_bias", "position_bias", "size_bias")] == [1, 1, 1]


def test_latents_are_compared_with_the_teachers_from_other_noise():
    def bright(noise: Tensor, texts: list[str]) -> Tensor:
        return noise[:, :1, :1, :1].sigmoid().expand(-1, 3, 32, 32)

    def shifted(noise: Tensor, texts: list[str]) -> Tensor:
        return bright(noise, texts) + 1

    def taught(generate) -> Contestant:
        return Contestant("test", 4, (1, 2, 2), generate, lambda images: images[:, :1] * 3, bright, "bright")

    watch = Watch(per_task=4, samples=8)
    own, far = watch(taught(bright))["latent_distance"], watch(taught(shifted))["latent_distance"]
    assert 0 < own.mean < 0.2
    # A shift of 3 in each of the 4 pooled values; the chance difference of the means counts once more.
    assert far.mean == pytest.approx(4 * 3**2, abs=4)
    assert own.low <= own.mean <= own.high < far.low
