"""The Shapes detector: correct on true pictures, strict on wrong ones, with a smooth grade in between."""

from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor
from worlds import asking, blend, content_of, drawn, otherwise, picture

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.rules import RELATIONS, verdict
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import COLORS, SHAPES, TASKS, contents
from gdmd_lightning.shapes.detector import ShapesDetector, find_components, grade

every_task = pytest.mark.parametrize("task", TASKS)
both_splits = pytest.mark.parametrize("split", ["train", "test"])
COUNT = 250  # scenes per task and split


def verdicts(images: Tensor, prompts: list[Prompt]) -> np.ndarray:
    detector = ShapesDetector()
    found = detector.detect(images, prompts)
    return np.array([verdict(f, p.metadata, detector.rules).correct for f, p in zip(found, prompts, strict=True)])


# True and wrong pictures.


@every_task
@both_splits
def test_verdict_accepts_true_pictures(task: str, split: str) -> None:
    prompts, images = drawn(task, split, COUNT)
    assert verdicts(images, prompts).mean() >= 0.99


@every_task
@both_splits
def test_verdict_rejects_pictures_of_other_contents(task: str, split: str) -> None:
    """On a diagonal two relations may hold at once under GenEval's rules, for example left of and above."""
    prompts, images = drawn(task, split, COUNT)
    assert verdicts(images, otherwise(prompts)).mean() <= (0.05 if task == "position" else 0.01)


@every_task
@both_splits
def test_grade_of_the_true_content_exceeds_that_of_another(task: str, split: str) -> None:
    prompts, images = drawn(task, split, COUNT)
    assert (grade(images, prompts) > grade(images, otherwise(prompts))).mean() >= 0.99


@every_task
def test_verdict_tolerates_decoder_noise(task: str) -> None:
    prompts, images = drawn(task, "test", COUNT)
    noisy = images + 0.04 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert verdicts(noisy.clamp(0, 1), prompts).mean() >= 0.99


@every_task
def test_empty_picture_is_wrong_and_has_grade_zero(task: str) -> None:
    prompts = [asking(content) for content in contents(task)]
    empty = picture().expand(len(prompts), 3, 32, 32)
    assert not verdicts(empty, prompts).any()
    assert (grade(empty, prompts) == 0).all()


@every_task
def test_grade_lies_in_the_unit_interval(task: str) -> None:
    prompts, images = drawn(task, "train", 30)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0))
    graded = grade(torch.cat([images, noise, (images + noise) / 2]), prompts * 3)
    assert ((graded >= 0) & (graded <= 1)).all()


@every_task
def test_grade_does_not_depend_on_the_batch(task: str) -> None:
    prompts, images = drawn(task, "test", 8)
    together = grade(images, prompts)
    alone = [grade(image[None], [prompt])[0] for image, prompt in zip(images, prompts)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)


def test_verdict_rejects_one_object_too_many() -> None:
    two, three = ([asking(content_of("counting", f"{count} circles"))] for count in ("two", "three"))
    objects = [("circle", "red", 8, 8, 4.2), ("circle", "red", 24, 8, 4.2), ("circle", "red", 16, 23, 4.2)]
    assert verdicts(picture(*objects), three).all()
    assert not verdicts(picture(*objects), two).any()
    assert verdicts(picture(*objects[:2]), two).all()


def test_verdict_binds_colors_to_objects() -> None:
    prompt = [asking(content_of("color_attr", "a red circle and a blue square"))]
    assert verdicts(picture(("circle", "red", 8, 8, 5), ("square", "blue", 23, 23, 5)), prompt).all()
    assert not verdicts(picture(("circle", "blue", 8, 8, 5), ("square", "red", 23, 23, 5)), prompt).any()


def test_verdict_finds_a_color_behind_a_more_confident_object_of_the_class() -> None:
    """The third object, which fits its template least, must still count as the green circle."""
    prompt = [asking(content_of("colors", "a green circle"))]
    circles = [("circle", "red", 8, 8, 5), ("circle", "blue", 24, 8, 5), ("circle", "green", 16, 23, 4)]
    assert verdicts(picture(*circles), prompt).all()
    assert not verdicts(picture(*circles[:2]), prompt).any()


def test_detections_lie_where_shapes_were_drawn() -> None:
    (found,) = ShapesDetector().detect(picture(("square", "blue", 10, 20, 5)), [Prompt("a blue square")])
    (square,) = found
    assert (square.label, square.color) == ("square", "blue")
    assert square.box == pytest.approx((10 - 4.3, 20 - 4.3, 10 + 4.3, 20 + 4.3), abs=0.8)
    assert 0.9 < square.score <= 1


def test_find_components_gives_few_surplus_components_and_they_fit_no_shape() -> None:
    """The anti-aliased border of a red shape is closest to yellow and may be found as a ring."""
    for task in TASKS:
        prompts, images = drawn(task, "train", COUNT)
        wanted = sum(clause["count"] for prompt in prompts for clause in prompt.metadata["include"])
        best = find_components(images).overlap.max(1)
        assert (best > 0.5).sum() == wanted
        assert (best <= 0.5).sum() <= 0.1 * wanted


# The grade between a wrong picture and a right one.


def assert_rises(values: np.ndarray, jitter: float = 0.0) -> None:
    """Check that values rise strictly or, with ``jitter``, except for small falls as edges cross pixels."""
    assert (np.diff(values) > (0 if jitter == 0 else -jitter)).all(), np.round(values, 4)
    assert values[-1] - values[0] > 0.3


@pytest.mark.parametrize(("wrong", "right"), list(permutations(COLORS, 2)))
def test_grade_rises_as_a_color_becomes_right(wrong: str, right: str) -> None:
    """Coverage is measured along the nearest palette color, so near yellow it jumps when that color changes."""
    path = blend(picture(("circle", wrong, 16, 15, 5)), picture(("circle", right, 16, 15, 5)), torch.linspace(0, 1, 21))
    prompt = asking(content_of("colors", f"a {right} circle"))
    assert_rises(grade(path, [prompt] * len(path)), jitter=0.04 if "yellow" in (wrong, right) else 0.0)


@pytest.mark.parametrize(("wrong", "right"), list(permutations(SHAPES, 2)))
def test_grade_rises_as_a_shape_becomes_right(wrong: str, right: str) -> None:
    path = blend(picture((wrong, "red", 16, 15, 5)), picture((right, "red", 16, 15, 5)), torch.linspace(0, 1, 21))
    prompt = asking(content_of("single_object", f"a {right}"))
    assert_rises(grade(path, [prompt] * len(path)))


TOWARD = dict(zip(RELATIONS, [(-1, 0), (1, 0), (0, -1), (0, 1)]))


@pytest.mark.parametrize("relation", RELATIONS)
def test_grade_rises_as_an_object_moves_past_its_landmark(relation: str) -> None:
    dx, dy = TOWARD[relation]
    landmark = ("square", "red", 16 + 6 * dy, 16 + 6 * dx, 4.4)
    path = torch.cat(
        [picture(landmark, ("circle", "blue", 16 - 6 * dy + dx * s, 16 - 6 * dx + dy * s, 4.4)) for s in range(-11, 12)]
    )
    prompt = asking(content_of("position", f"a circle {relation} a square"))
    assert_rises(grade(path, [prompt] * len(path)))


@pytest.mark.parametrize("relation", RELATIONS)
def test_grade_rises_as_an_object_circles_its_landmark(relation: str) -> None:
    dx, dy = TOWARD[relation]
    landmark, path = ("square", "red", 16, 16, 4.4), []
    for angle in np.linspace(np.pi, 0, 25):
        along, across = 11 * np.cos(angle), 11 * np.sin(angle)
        path.append(
            picture(landmark, ("circle", "blue", 16 + along * dx - across * dy, 16 + along * dy + across * dx, 4.4))
        )
    prompt = asking(content_of("position", f"a circle {relation} a square"))
    assert_rises(grade(torch.cat(path), [prompt] * len(path)), jitter=0.005)


def three(shape: str) -> list[tuple[str, str, float, float, float]]:
    return [(shape, "red", 8, 8, 4.2), (shape, "green", 24, 8, 4.2), (shape, "blue", 16, 23, 4.2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_grade_rises_as_a_half_visible_object_fades_in(shape: str) -> None:
    """All pixels along a square's straight edge join its component at once."""
    path = blend(picture(*three(shape)[:2]), picture(*three(shape)), torch.linspace(0.5, 1, 6))
    prompt = asking(content_of("counting", f"three {shape}s"))
    assert_rises(grade(path, [prompt] * len(path)), jitter=0.02 if shape == "square" else 0.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_grade_falls_only_slightly_as_a_missing_object_fades_in(shape: str) -> None:
    """Below half opacity the detector takes an object for background and gives no credit."""
    path = blend(picture(*three(shape)[:2]), picture(*three(shape)), torch.linspace(0, 1, 21))
    prompt = asking(content_of("counting", f"three {shape}s"))
    assert_rises(grade(path, [prompt] * len(path)), jitter=0.05)


@pytest.mark.parametrize("shape", ["circle", "triangle"])
def test_grade_rises_as_a_surplus_object_fades_out(shape: str) -> None:
    path = blend(picture(*three(shape)), picture(*three(shape)[:2]), torch.linspace(0, 1, 21))
    prompt = asking(content_of("counting", f"two {shape}s"))
    assert_rises(grade(path, [prompt] * len(path)), jitter=0.001)


def test_detector_refuses_pictures_of_another_size():
    for height, width in ((64, 32), (32, 64)):
        with pytest.raises(UserError, match=f"^Shapes detector: it cannot read pictures of {height}x{width}; "):
            ShapesDetector().detect(torch.zeros(1, 3, height, width), [Prompt("")])
