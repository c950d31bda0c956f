"""The judge of the Shapes world: right about true pictures, strict about wrong ones, and smooth in between."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import asking, blend, content_of, drawn, otherwise, picture

from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import COLORS, RELATIONS, SHAPES, TASKS, contents
from gdmd_lightning.shapes.detector import detect, grade, verdict

every_task = pytest.mark.parametrize("task", TASKS)
both_splits = pytest.mark.parametrize("split", ["train", "test"])
COUNT = 250  # scenes a task and split


def verdicts(images: Tensor, prompts: list[Prompt]) -> np.ndarray:
    return verdict(detect(images), prompts)


def grades(images: Tensor, prompts: list[Prompt]) -> np.ndarray:
    return grade(detect(images), prompts)


# True and wrong pictures.


@every_task
@both_splits
def test_true_pictures_pass(task: str, split: str) -> None:
    prompts, images = drawn(task, split, COUNT)
    assert verdicts(images, prompts).mean() >= 0.99


@every_task
@both_splits
def test_pictures_of_something_else_fail(task: str, split: str) -> None:
    """A diagonal neighbour may stand both left of and above: GenEval lets both relations hold."""
    prompts, images = drawn(task, split, COUNT)
    assert verdicts(images, otherwise(prompts)).mean() <= (0.05 if task == "position" else 0.01)


@every_task
@both_splits
def test_a_true_pictures_grade_is_above_that_of_another_content(task: str, split: str) -> None:
    prompts, images = drawn(task, split, COUNT)
    found = detect(images)
    assert (grade(found, prompts) > grade(found, otherwise(prompts))).mean() >= 0.99


@every_task
def test_pictures_pass_with_the_noise_of_a_decoder(task: str) -> None:
    prompts, images = drawn(task, "test", COUNT)
    noisy = images + 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert verdicts(noisy.clamp(0, 1), prompts).mean() >= 0.99


@every_task
def test_an_empty_picture_fails_and_earns_nothing(task: str) -> None:
    prompts = [asking(content) for content in contents(task)]
    empty = picture().expand(len(prompts), 3, 32, 32)
    assert not verdicts(empty, prompts).any()
    assert (grades(empty, prompts) == 0).all()


@every_task
def test_grades_lie_in_the_unit_interval(task: str) -> None:
    prompts, images = drawn(task, "train", 30)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    graded = grades(torch.cat([images, noise, (images + noise) / 2]), prompts * 3)
    assert ((graded >= 0) & (graded <= 1)).all()


@every_task
def test_a_picture_is_judged_the_same_alone_and_in_a_batch(task: str) -> None:
    prompts, images = drawn(task, "test", 8)
    together = grades(images, prompts)
    alone = [grades(image[None], [prompt])[0] for image, prompt in zip(images, prompts)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_one_object_too_many_fails_an_exact_count() -> None:
    two, three = ([asking(content_of("counting", f"{count} circles"))] for count in ("two", "three"))
    objects = [("circle", "red", 8, 8, 4.2), ("circle", "red", 24, 8, 4.2), ("circle", "red", 16, 23, 4.2)]
    assert verdicts(picture(*objects), three).all()
    assert not verdicts(picture(*objects), two).any()
    assert verdicts(picture(*objects[:2]), two).all()


def test_a_colour_belongs_to_its_object() -> None:
    prompt = [asking(content_of("color_attr", "a red circle and a blue square"))]
    assert verdicts(picture(("circle", "red", 8, 8, 5), ("square", "blue", 23, 23, 5)), prompt).all()
    assert not verdicts(picture(("circle", "blue", 8, 8, 5), ("square", "red", 23, 23, 5)), prompt).any()


def test_what_is_found_beside_what_was_drawn_is_rare_and_no_shape() -> None:
    """Red's anti-aliased border is nearest to yellow, and may be found as a ring."""
    for task in TASKS:
        prompts, images = drawn(task, "train", COUNT)
        wanted = sum(clause["count"] for prompt in prompts for clause in prompt.metadata["include"])
        best = detect(images).overlap.max(1)
        assert (best > 0.5).sum() == wanted
        assert (best <= 0.5).sum() <= 0.1 * wanted


# The grade between a wrong picture and a right one.


def assert_rises(values: np.ndarray, jitter: float = 0.0) -> None:
    """Strictly, or but for the steps of the pixel grid that the edge of a shape crosses."""
    assert (np.diff(values) > (0 if jitter == 0 else -jitter)).all(), np.round(values, 4)
    assert values[-1] - values[0] > 0.3


@pytest.mark.parametrize(("wrong", "right"), list(permutations(COLORS, 2)))
def test_grade_rises_as_a_colour_turns_right(wrong: str, right: str) -> None:
    """Coverage is measured along the nearest palette colour; from or to yellow it jumps where that changes."""
    way = blend(picture(("circle", wrong, 16, 15, 5)), picture(("circle", right, 16, 15, 5)), torch.linspace(0, 1, 21))
    prompt = asking(content_of("colors", f"a {right} circle"))
    assert_rises(grades(way, [prompt] * len(way)), jitter=0.04 if "yellow" in (wrong, right) else 0.0)


@pytest.mark.parametrize(("wrong", "right"), list(permutations(SHAPES, 2)))
def test_grade_rises_as_a_shape_turns_right(wrong: str, right: str) -> None:
    way = blend(picture((wrong, "red", 16, 15, 5)), picture((right, "red", 16, 15, 5)), torch.linspace(0, 1, 21))
    prompt = asking(content_of("single_object", f"a {right}"))
    assert_rises(grades(way, [prompt] * len(way)))


TOWARDS = dict(zip(RELATIONS, [(-1, 0), (1, 0), (0, -1), (0, 1)]))


@pytest.mark.parametrize("relation", RELATIONS)
def test_grade_rises_as_an_object_passes_to_the_right_side(relation: str) -> None:
    dx, dy = TOWARDS[relation]
    landmark = ("square", "red", 16 + 6 * dy, 16 + 6 * dx, 4.4)
    way = torch.cat(
        [picture(landmark, ("circle", "blue", 16 - 6 * dy + dx * s, 16 - 6 * dx + dy * s, 4.4)) for s in range(-11, 12)]
    )
    prompt = asking(content_of("position", f"a circle {relation} a square"))
    assert_rises(grades(way, [prompt] * len(way)))


@pytest.mark.parametrize("relation", RELATIONS)
def test_grade_rises_as_an_object_goes_round_to_the_right_side(relation: str) -> None:
    dx, dy = TOWARDS[relation]
    landmark, way = ("square", "red", 16, 16, 4.4), []
    for angle in np.linspace(np.pi, 0, 25):
        along, across = 11 * np.cos(angle), 11 * np.sin(angle)
        way.append(
            picture(landmark, ("circle", "blue", 16 + along * dx - across * dy, 16 + along * dy + across * dx, 4.4))
        )
    prompt = asking(content_of("position", f"a circle {relation} a square"))
    assert_rises(grades(torch.cat(way), [prompt] * len(way)), jitter=0.005)


def three(shape: str) -> list[tuple[str, str, float, float, float]]:
    return [(shape, "red", 8, 8, 4.2), (shape, "green", 24, 8, 4.2), (shape, "blue", 16, 23, 4.2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_grade_rises_as_a_missing_third_object_fades_in_from_half(shape: str) -> None:
    """The straight borders of a square enter its component at once."""
    way = blend(picture(*three(shape)[:2]), picture(*three(shape)), torch.linspace(0.5, 1, 6))
    prompt = asking(content_of("counting", f"three {shape}s"))
    assert_rises(grades(way, [prompt] * len(way)), jitter=0.02 if shape == "square" else 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_grade_hardly_ever_falls_as_a_missing_third_object_fades_in(shape: str) -> None:
    """Below half its opacity an object is background to the detector, and earns nothing."""
    way = blend(picture(*three(shape)[:2]), picture(*three(shape)), torch.linspace(0, 1, 21))
    prompt = asking(content_of("counting", f"three {shape}s"))
    assert_rises(grades(way, [prompt] * len(way)), jitter=0.05)


@pytest.mark.parametrize("shape", ["circle", "triangle"])
def test_grade_rises_as_a_surplus_object_fades_out(shape: str) -> None:
    way = blend(picture(*three(shape)), picture(*three(shape)[:2]), torch.linspace(0, 1, 21))
    prompt = asking(content_of("counting", f"two {shape}s"))
    assert_rises(grades(way, [prompt] * len(way)), jitter=0.001)
