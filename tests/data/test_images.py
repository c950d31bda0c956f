"""Real images: a folder with captions, and pictures of Shapes."""

import json
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from gdmd_lightning.data.images import CaptionedImages, ShapesImages, read_image
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.shapes.captions import evaluation_prompts
from gdmd_lightning.shapes.detector import grade

COLORS = {"red.png": (255, 0, 0), "dark.png": (100, 0, 0), "blue.jpg": (0, 0, 255)}


@pytest.fixture
def folder(tmp_path):
    for name, color in COLORS.items():
        Image.new("RGB", (40, 20), color).save(tmp_path / name)
    rows = [("red.png", "red"), ("dark.png", "red"), ("blue.jpg", "blue")]
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def rngs(count, seed=0):
    """A stream for each prompt."""
    return [torch.Generator().manual_seed(count * seed + i) for i in range(count)]


def test_each_prompt_gets_an_image_of_its_caption(folder):
    source = CaptionedImages(str(folder))
    images = source.draw([Prompt("blue"), Prompt("red"), Prompt("red"), Prompt("red"), Prompt("red")], 16, 24, rngs(5))
    assert images.shape == (5, 3, 16, 24)
    assert images[0, 2].min() > 0.9
    assert images[0, 0].max() < 0.1
    assert {round(float(image[0].mean()), 2) for image in images[1:]} == {1.0, 0.39}
    assert images[1:, 2].max() == 0


def test_draw_depends_on_the_stream_alone(folder):
    source, prompts = CaptionedImages(str(folder)), [Prompt("red")] * 8
    one, same, other = (source.draw(prompts, 8, 8, rngs(8, seed)) for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("shapes", [False, True])
def test_image_of_a_prompt_does_not_depend_on_the_other_prompts(folder, shapes):
    source = ShapesImages() if shapes else CaptionedImages(str(folder))
    prompts = evaluation_prompts(2)[:6] if shapes else [Prompt("red")] * 6
    whole = source.draw(prompts, 32, 32, rngs(6))
    assert torch.equal(source.draw(prompts[4:], 32, 32, rngs(6)[4:]), whole[4:])
    assert len({tuple(image.flatten().tolist()) for image in whole}) >= 2


def test_image_covers_the_resolution_and_is_cropped_at_its_center(tmp_path):
    image = Image.new("RGB", (30, 10), (255, 0, 0))
    image.paste((0, 255, 0), (10, 0, 20, 10))
    image.save(tmp_path / "stripes.png")
    found = read_image(tmp_path / "stripes.png", 10, 10)
    assert torch.equal(found, torch.tensor([0.0, 1.0, 0.0]).view(3, 1, 1).expand(3, 10, 10))


def test_captions_can_be_the_training_prompts(folder):
    data = PromptDataModule(str(folder / "metadata.jsonl"), batch_size=2, group_size=1, column="text")
    CaptionedImages(str(folder)).check(data)


def test_prompt_without_an_image_is_named(folder):
    data = SimpleNamespace(texts=lambda: iter(["red", "green"]))
    with pytest.raises(UserError, match=r"metadata\.jsonl: no image has the caption 'green'"):
        CaptionedImages(str(folder)).check(data)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "red.png"}', r"metadata\.jsonl:2: not a captioned image"),
        ("red.png", r"metadata\.jsonl:2: broken JSON at column 1"),
        ('{"file_name": "red.png", "text": ["red", "a circle"]}', r"metadata\.jsonl:2: not a captioned image"),
        (b'{"file_name": "red.png", "text": "caf\xe9"}', r"metadata\.jsonl:2: not UTF-8 \(byte 0xe9"),
        ('["red.png", "red"]', r"metadata\.jsonl:2: not a captioned image"),
        ('{"file_name": "none.png", "text": "red"}', r"metadata\.jsonl:2: no such file: .*none\.png"),
    ],
)
def test_wrong_line_is_named(folder, line, said):
    line = line.encode() if isinstance(line, str) else line
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "red.png", "text": "red"}\n' + line + b"\n")
    with pytest.raises(UserError, match=said):
        CaptionedImages(str(folder)).check(SimpleNamespace(texts=lambda: iter(["red"])))


def test_byte_order_mark_is_no_part_of_the_first_line(folder):
    whole = CaptionedImages(str(folder)).files
    (folder / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "metadata.jsonl").read_bytes())
    assert CaptionedImages(str(folder)).files == whole


def test_image_is_turned_as_its_exif_data_say_and_more_than_8_bits_are_refused(tmp_path):
    image, exif = Image.new("RGB", (8, 16), (255, 255, 255)), Image.Exif()
    image.paste((0, 0, 0), (0, 0, 8, 8))  # the upper half, which is the right one in the turned image
    exif[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=exif)
    found = read_image(tmp_path / "turned.png", 8, 16)
    assert found[:, :, :8].min() == 1
    assert found[:, :, 8:].max() == 0
    Image.new("I;16", (8, 8), 256).save(tmp_path / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png: not a readable image: its pixels have more than 8 bits"):
        read_image(tmp_path / "deep.png", 8, 8)


def test_folder_without_metadata_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"model\.images\.path: .* has no metadata\.jsonl"):
        CaptionedImages(str(tmp_path))


def test_file_that_is_no_image_is_named(folder):
    (folder / "blue.jpg").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"blue\.jpg: not a readable image"):
        CaptionedImages(str(folder)).draw([Prompt("blue")], 8, 8, rngs(1))


def test_shapes_pictures_show_their_prompts():
    prompts = evaluation_prompts(2)
    images = ShapesImages().draw(prompts, 32, 32, rngs(len(prompts)))
    assert images.shape == (len(prompts), 3, 32, 32)
    assert torch.as_tensor(grade(images, prompts)).mean() > 0.9
    assert not torch.equal(images, ShapesImages().draw(prompts, 32, 32, rngs(len(prompts), 1)))
    assert torch.equal(images, ShapesImages().draw(prompts, 32, 32, rngs(len(prompts))))


def test_shapes_pictures_refuse_another_size_or_source():
    with pytest.raises(UserError, match=r"pictures of Shapes have 32x32 pixels, not 64x32"):
        ShapesImages().draw(evaluation_prompts(1), 64, 32, rngs(6))
    with pytest.raises(UserError, match=r"ShapesImages cannot draw the prompts of 'prompts\.txt'"):
        ShapesImages().check(SimpleNamespace(source="prompts.txt"))
    ShapesImages().check(SimpleNamespace(source="shapes"))
