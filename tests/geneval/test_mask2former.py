"""GenEval's detector on a tiny Mask2Former and a tiny CLIP: from outputs to objects, colors and verdicts."""

import shutil
import socket
from pathlib import Path

import published
import pytest
import torch
from tiny_detector import save_mask2former
from torch.nn import functional as F

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.preprocessing import CLIP_MEAN, CLIP_STD
from gdmd_lightning.geneval.classes import CLASSES, COLORS
from gdmd_lightning.geneval.colors import GRAY, TEMPLATES, ColorClassifier, crop
from gdmd_lightning.geneval.mask2former import Instances, Mask2FormerDetector, check_classes, instances_of
from gdmd_lightning.geneval.rules import Rules
from gdmd_lightning.prompts import Prompt

PICTURES = torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(0))
PROMPTS = [Prompt("a cup", {"tag": "single_object", "include": [{"class": "cup", "count": 1}]})] * 3


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("geneval")
    return str(save_mask2former(directory / "detector")), str(published.save_clip(directory / "clip"))


def detector(places, **options) -> Mask2FormerDetector:
    return Mask2FormerDetector(*places, **{"shortest_edge": 64, "longest_edge": 96, **options})


# From the network's outputs to objects.


def test_objects_are_ranked_by_probability_times_quality_of_the_mask():
    classes = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    masks = torch.full((2, 4, 4), -1.0)
    masks[0, 1:3, 0:2] = torch.tensor([[2.0, 2.0], [4.0, 4.0]])
    masks[1, 3, 3] = 0.5
    found = instances_of(classes, masks, (4, 4))
    probabilities = classes.softmax(-1)
    quality = [(torch.tensor([2.0, 2.0, 4.0, 4.0]).sigmoid().mean()), torch.tensor(0.5).sigmoid()]
    expected = sorted(((probabilities[q, c] * quality[q]).item(), c, q) for q in (0, 1) for c in (0, 1))[::-1]
    assert found.scores.tolist() == pytest.approx([score for score, _, _ in expected], rel=1e-5)
    assert found.classes.tolist() == [c for _, c, _ in expected]
    boxes = {0: [0, 1, 2, 3], 1: [3, 3, 4, 4]}
    assert found.boxes.tolist() == [boxes[q] for _, _, q in expected]
    assert all(torch.equal(mask, masks[q] > 0) for mask, (_, _, q) in zip(found.masks, expected, strict=True))


def test_query_with_an_empty_mask_is_no_object():
    found = instances_of(torch.tensor([[5.0, 0.0]]), torch.full((1, 4, 4), -1.0), (4, 4))
    assert found.boxes.shape == (0, 4)


def test_at_most_a_hundred_pairs_of_query_and_class_are_taken():
    draw = torch.Generator().manual_seed(0)
    classes = torch.randn(30, 9, generator=draw)
    found = instances_of(classes, torch.ones(30, 2, 2), (2, 2))
    best = classes.softmax(-1)[:, :-1].flatten().sort(descending=True).values[:100] * torch.tensor(1.0).sigmoid()
    torch.testing.assert_close(found.scores, best, atol=1e-6, rtol=1e-5)


def test_masks_are_resized_to_the_picture_before_they_are_cut_at_0():
    logits = torch.tensor([[[1.0, -3.0]]])
    found = instances_of(torch.tensor([[5.0, 0.0]]), logits, (2, 8))
    expected = F.interpolate(logits[None], (2, 8), mode="bilinear")[0, 0] > 0
    assert torch.equal(found.masks[0], expected)
    assert found.boxes.tolist() == [[0, 0, int(expected[0].sum()), 2]]


# The network.


@pytest.mark.parametrize(
    ("height", "width", "size", "padded"),
    [(40, 56, (64, 90), (64, 96)), (40, 40, (64, 64), (64, 64)), (20, 60, (32, 96), (32, 96))],
)
def test_pictures_are_resized_by_the_short_side_unless_the_long_one_gets_too_long(places, height, width, size, padded):
    pixels, found = detector(places).prepared(torch.full((1, 3, height, width), 0.5))
    assert found == size
    assert pixels.shape[-2:] == padded
    expected = (0.5 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 5, 5], expected)
    assert not pixels[..., size[1] :].any()


def test_detections_are_those_of_the_network_in_every_batch_and_after_rounding(places, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was opened"))
    whole = detector(places).detect(PICTURES, PROMPTS)
    assert any(whole)
    assert {found.label for objects in whole for found in objects} <= set(CLASSES)
    alone = [detector(places, batch_size=1).detect(PICTURES[i : i + 1], PROMPTS[:1])[0] for i in range(3)]
    for one, other in zip(whole, alone, strict=True):
        # Objects of nearly equal scores may change places.
        key = lambda found: (found.label, found.box, round(found.score, 4))  # noqa: E731
        assert sorted(map(key, one)) == sorted(map(key, other))
    written = (PICTURES * 255).round() / 255
    assert detector(places).detect(written, PROMPTS) == whole
    scores = [found.scores.tolist() for found in detector(places).instances(written)]
    assert [[found.score for found in objects] for objects in whole] == scores


def test_both_networks_move_to_the_device(places):
    one, meta = detector(places), torch.device("meta")
    one.prepare()
    one.to(meta)
    networks = one._model(), one.color_classifier._model()[0]
    assert {weight.device for network in networks for weight in network.parameters()} == {meta}


def test_scores_equal_those_computed_straight_from_transformers(places):
    from transformers import Mask2FormerForUniversalSegmentation

    one = detector(places)
    pixels, size = one.prepared((PICTURES * 255).round() / 255)
    with torch.no_grad():
        out = Mask2FormerForUniversalSegmentation.from_pretrained(places[0])(pixel_values=pixels)
    masks = F.interpolate(out.masks_queries_logits, pixels.shape[-2:], mode="bilinear")[..., : size[0], : size[1]]
    masks = F.interpolate(masks, (40, 56), mode="bilinear")
    for row, found in enumerate(one.instances((PICTURES * 255).round() / 255)):
        inside = masks[row] > 0
        quality = (masks[row].sigmoid() * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
        scores = out.class_queries_logits[row].softmax(-1)[:, :-1] * quality[:, None]
        expected = scores[inside.any(2).any(1)].flatten().sort(descending=True).values
        torch.testing.assert_close(found.scores[:20], expected[:20], atol=1e-5, rtol=1e-4)


def test_sketch_has_both_networks_on_the_meta_device(places):
    weights = list(detector(places).sketch().parameters())
    assert {weight.device.type for weight in weights} == {"meta"}
    both = list(detector(places)._model().parameters()) + list(ColorClassifier(places[1])._model()[0].parameters())
    assert sum(w.numel() for w in weights) == sum(w.numel() for w in both)


def test_networks_have_the_precision_that_is_asked_for_and_give_nearly_the_same(places):
    exact, rounded = (detector(places, dtype=dtype) for dtype in ("float32", "bfloat16"))
    networks = (rounded._model(), rounded.color_classifier._model()[0], rounded.sketch())
    assert {weight.dtype for network in networks for weight in network.parameters()} == {torch.bfloat16}
    for one, other in zip(exact.instances(PICTURES), rounded.instances(PICTURES), strict=True):
        assert other.scores.dtype == torch.float32
        assert 0 < (one.scores[:5] - other.scores[:5]).abs().max() < 0.05
    classifiers = [each.color_classifier.classifier("cup") for each in (exact, rounded)]
    assert classifiers[1].dtype == torch.float32
    assert 0 < (classifiers[0] - classifiers[1]).abs().max() < 0.05
    asked = [Prompt("a red cup", {"include": [{"class": name, "count": 1, "color": "red"} for name in CLASSES]})] * 3
    colors = [found.color for objects in rounded.detect(PICTURES, asked) for found in objects]
    assert set(colors) & set(COLORS)


def test_unknown_precision_is_refused(places):
    with pytest.raises(UserError, match=r"Mask2FormerDetector\.dtype: it is 'float8'; use float32, bfloat16, float16"):
        detector(places, dtype="float8")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("cat", *CLASSES[1:]), "has 80 classes, and number 0 is 'cat'; give a model of the 80 classes"),
        (CLASSES[:5], "has 5 classes, and number 0 is 'person'"),
    ],
)
def test_network_of_other_classes_is_refused(tmp_path, places, names, expected):
    other = Mask2FormerDetector(str(save_mask2former(tmp_path / "d", names)), places[1])
    with pytest.raises(UserError) as refused:
        other.detect(PICTURES, PROMPTS)
    assert expected in str(refused.value)


def test_names_that_published_models_use_are_accepted():
    names = {"motorcycle": "motorbike", "computer mouse": "mouse", "tv": "tvmonitor", "tv remote": "remote"}
    check_classes({i: names.get(name, name) for i, name in enumerate(CLASSES)}, "path", "where")


@pytest.mark.usefixtures("no_network")
def test_loading_from_a_path_opens_no_socket(places):
    detector(places).detect(PICTURES, PROMPTS)


def test_directories_of_other_models_are_refused_at_once(places, tmp_path):
    with pytest.raises(UserError, match=r"^GenEval's detector: '.*clip' is a model of type 'clip'; give a Mask2Former"):
        Mask2FormerDetector(places[1], places[1])
    with pytest.raises(UserError, match=r"^GenEval's color classifier: '.*' is a model of type 'mask2former'; give a"):
        Mask2FormerDetector(places[0], places[0])
    with pytest.raises(UserError, match=r"has no config\.json"):
        Mask2FormerDetector(str(tmp_path), places[1])


def test_truncated_weights_are_one_line(places, tmp_path):
    broken = Path(shutil.copytree(places[0], tmp_path / "detector"))
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(UserError, match=r"^GenEval's detector: '.*' cannot be loaded: ") as refused:
        Mask2FormerDetector(str(broken), places[1]).detect(PICTURES, PROMPTS)
    assert "\n" not in str(refused.value)


# Colors.


def test_object_is_put_on_gray_and_cut_to_its_box():
    image = torch.rand(3, 30, 30)
    mask = torch.zeros(30, 30, dtype=torch.bool)
    mask[5:13, 2:10] = True
    mask[5, 2] = False
    (found,) = crop(image, (2, 5, 10, 13), mask, 8)
    assert found[:, 0, 0].tolist() == pytest.approx([GRAY] * 3)
    assert torch.equal(found[:, 1:, 1:], image[:, 6:13, 3:10])


def test_color_is_the_one_whose_templates_are_nearest_under_clip(places):
    from transformers import CLIPModel, CLIPTokenizer

    model, tokenizer = CLIPModel.from_pretrained(places[1]), CLIPTokenizer.from_pretrained(places[1])
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    picture, mask = torch.rand(3, 48, 48), torch.ones(48, 48, dtype=torch.bool)
    with torch.no_grad():
        image = F.normalize(model.get_image_features((picture[None] - mean) / std).pooler_output, dim=-1)
        texts = []
        for color in COLORS:
            words = [template.format(color=color, name="cup") for template in TEMPLATES]
            tokens = tokenizer(words, padding=True, return_tensors="pt")
            each = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
            texts.append(F.normalize(each.mean(0), dim=-1))
    classifier = ColorClassifier(places[1])
    torch.testing.assert_close(classifier.classifier("cup"), torch.stack(texts), atol=1e-5, rtol=1e-5)
    expected = COLORS[int((image @ torch.stack(texts).T).argmax())]
    assert classifier.classify(picture, [(0, 0, 48, 48)], mask[None], "cup") == [expected]


class Painter:
    """Stands in for the color classifier: every object is red; keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def classify(self, image, boxes, masks, name):
        self.asked.append((name, boxes))
        return ["red"] * len(boxes)


def made(*objects: tuple[str, float]) -> Instances:
    """Objects of these classes and scores, in one row of the picture."""
    masks = torch.zeros(len(objects), 8, 8, dtype=torch.bool)
    for i in range(len(objects)):
        masks[i, 2, i] = True
    boxes = torch.tensor([[i, 2, i + 1, 3] for i in range(len(objects))])
    classes = torch.tensor([CLASSES.index(name) for name, _ in objects])
    return Instances(classes, torch.tensor([score for _, score in objects]), masks, boxes)


@pytest.mark.parametrize(("rules", "asked"), [(Rules(), [(0, 2, 1, 3), (2, 2, 3, 3)]), (Rules(color_first=True), None)])
def test_only_colors_that_a_clause_judges_are_named(places, monkeypatch, rules, asked):
    found = made(("cup", 0.9), ("dog", 0.8), ("cup", 0.7), ("cup", 0.5), ("cup", 0.2))
    one = detector(places, rules=rules)
    monkeypatch.setattr(one, "instances", lambda images: [found])
    one.color_classifier = Painter()
    two = {"tag": "colors", "include": [{"class": "cup", "count": 2, "color": "red"}, {"class": "dog", "count": 1}]}
    (objects,) = one.detect(torch.zeros(1, 3, 8, 8), [Prompt("two red cups", two)])
    every = [(i, 2, i + 1, 3) for i in (0, 2, 3)]
    assert one.color_classifier.asked == [("cup", asked or every)]
    assert [each.label for each in objects] == ["cup", "dog", "cup", "cup", "cup"]
    assert [each.color for each in objects] == ["red", None, "red", None if asked else "red", None]
