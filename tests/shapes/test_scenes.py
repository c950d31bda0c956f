"""Scenes: each picture shows its content, with whole, separate objects in the right places."""

import math

import numpy as np
import pytest
import torch
from worlds import picture

from gdmd_lightning.geneval.rules import RELATIONS, relation_strength
from gdmd_lightning.shapes.captions import COLORS, SHAPES, TASKS, prompts
from gdmd_lightning.shapes.scenes import (
    BACKGROUND,
    PALETTE,
    SIZE,
    SQUARE,
    TRIANGLE,
    Scenes,
    render,
    sample_scenes,
)

every_task = pytest.mark.parametrize("task", TASKS)
AREA = {"circle": math.pi, "square": (2 * SQUARE) ** 2, "triangle": 3 * math.sqrt(3) / 4 * TRIANGLE**2}


def scenes_of(task: str, count: int = 200) -> tuple[list[dict], Scenes]:
    pool = prompts(task, "train")
    contents = [pool[i % len(pool)].metadata for i in range(count)]
    return contents, sample_scenes(contents, np.random.default_rng(0))


@every_task
def test_scene_contains_what_its_content_includes(task: str) -> None:
    contents, scenes = scenes_of(task)
    for content, shape, color in zip(contents, scenes.shape, scenes.color):
        wanted = [clause for clause in content["include"] for _ in range(clause["count"])]
        assert [SHAPES[s] for s in shape if s >= 0] == [clause["class"] for clause in wanted]
        for clause, c in zip(wanted, color):
            assert COLORS[c] == clause.get("color", COLORS[c])


@every_task
def test_scene_objects_do_not_touch_and_lie_inside_the_picture(task: str) -> None:
    _, scenes = scenes_of(task)
    for shape, center, radius in zip(scenes.shape, scenes.center, scenes.radius):
        alone = [
            1 - (picture((SHAPES[s], "blue", *c, r)) - picture()).abs().sum(1).lt(1e-6).float()
            for s, c, r in zip(shape, center, radius)
            if s >= 0
        ]
        for pixels, s, r in zip(alone, shape, radius):
            assert pixels.sum() >= 0.9 * AREA[SHAPES[s]] * r**2
        # Only anti-aliased borders may share a pixel.
        assert (torch.stack(alone).sum(0) > 1).sum() <= 3


def test_scene_relation_holds_clearly() -> None:
    contents, scenes = scenes_of("position")
    for content, center, radius, shape in zip(contents, scenes.center, scenes.radius, scenes.shape):
        relation = content["include"][1]["position"][0]
        smallest = np.full(2, 2 * radius[:2].sum() * 0.86)
        strength = relation_strength(center[1] - center[0], smallest)
        assert strength[RELATIONS.index(relation)] > 0.5
        assert (shape[2:] == -1).all()


def test_relation_strength_is_opposite_for_opposite_relations() -> None:
    offset, sizes = np.random.default_rng(0).normal(size=(50, 2)) * 8, np.full((50, 2), 16.0)
    left, right, above, below = np.moveaxis(relation_strength(offset, sizes), -1, 0)
    np.testing.assert_array_equal(left, -right)
    np.testing.assert_array_equal(above, -below)
    np.testing.assert_allclose(relation_strength(-offset, sizes)[:, 0], right)


@pytest.mark.parametrize(("relation", "offset"), list(zip(RELATIONS, [(-9, 0), (9, 0), (0, -9), (0, 9)])))
def test_relation_strength_is_largest_along_its_own_axis(relation: str, offset: tuple[int, int]) -> None:
    strength = relation_strength(np.array(offset, dtype=float), np.zeros(2))
    assert strength[RELATIONS.index(relation)] == 1
    assert strength.max() == 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", [3.7, 4.5, 6.0])
def test_render_gives_shapes_their_area(shape: str, radius: float) -> None:
    axis = torch.tensor(PALETTE["blue"]) - torch.tensor(BACKGROUND)
    for x in (15.0, 15.3, 15.5):
        alpha = (picture((shape, "blue", x, 16.2, radius))[0] - picture()[0]).sum(0) / axis.sum()
        assert alpha.sum() == pytest.approx(AREA[shape] * radius**2, rel=0.06)


@pytest.mark.parametrize("color", COLORS)
def test_render_paints_shape_and_background_in_their_colors(color: str) -> None:
    image = picture(("circle", color, 16, 16, 5.0))[0]
    torch.testing.assert_close(image[:, 16, 16], torch.tensor(PALETTE[color]))
    torch.testing.assert_close(image[:, 0, 0], torch.tensor(BACKGROUND))


@every_task
def test_render_gives_pictures_in_the_unit_range(task: str) -> None:
    images = render(scenes_of(task, 50)[1])
    assert images.shape == (50, 3, SIZE, SIZE)
    assert images.min() >= 0
    assert images.max() <= 1


def test_scenes_depend_only_on_the_seed() -> None:
    contents = [prompt.metadata for prompt in prompts("two_object", "train")]
    one, same, other = (render(sample_scenes(contents, np.random.default_rng(seed))) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
