"""Published rewards on tiny random weights against their formulas, computed straight from the libraries."""

import os
import shutil

import numpy as np
import published
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gdmd_lightning.data.readers import open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.preprocessing import CLIP_MEAN, CLIP_STD, center_crop, normalized, pad_square
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards import weights
from gdmd_lightning.rewards.aesthetic import AestheticScore
from gdmd_lightning.rewards.base import checked_score
from gdmd_lightning.rewards.clip import CLIPScore, ContrastiveReward, PickScore
from gdmd_lightning.rewards.geneval import GenEvalReward
from gdmd_lightning.rewards.hpsv2 import HPSv2
from gdmd_lightning.rewards.image_reward import ImageReward, build, published_sizes, renamed
from gdmd_lightning.rewards.network import distinct
from gdmd_lightning.rewards.ocr import OCRReward, similarity, wanted
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.shapes.detector import ShapesDetector

TEXTS = ["a red circle", "two blue circle", "a red circle", "a square of circle", "two square"]
PROMPTS = [Prompt(text) for text in TEXTS]


def pictures(height: int, width: int, count: int = 5) -> torch.Tensor:
    """Smooth random pictures whose values are multiples of 1/255, as of a PNG."""
    draw = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=draw)
    smooth = F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    directory = tmp_path_factory.mktemp("weights")
    architecture = published.open_clip_architecture(directory)
    torch.save(published.image_reward_weights(), directory / "ImageReward.pt")
    return {
        "clip": str(published.save_clip(directory / "clip")),
        "head": str(published.save_head(directory / "head.pth")),
        "architecture": architecture,
        "hps": str(published.save_hps(directory / "HPS_v2.1_compressed.pt", architecture)),
        "image_reward": str(directory / "ImageReward.pt"),
        "bert": str(published.save_bert_tokenizer(directory / "bert")),
    }


MADE = {
    "clip_score": lambda p, **options: CLIPScore(p["clip"], **options),
    "pickscore": lambda p, **options: PickScore(p["clip"], **options),
    "aesthetic": lambda p, **options: AestheticScore(p["clip"], p["head"], **options),
    "hpsv2": lambda p, **options: HPSv2(p["hps"], architecture=p["architecture"], **options),
    "image_reward": lambda p, **options: ImageReward(p["image_reward"], p["bert"], **options),
}
NAMES = tuple(MADE)


def clip_reference(places):
    """CLIP's logits per picture and text, and its unit embeddings of pictures."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(places["clip"])
    tokens = CLIPTokenizer.from_pretrained(places["clip"])(TEXTS, padding=True, return_tensors="pt")
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        out = model(pixel_values=(pictures(48, 48) - mean) / std, **tokens)
    return out.logits_per_image.diagonal(), out.image_embeds, model.logit_scale.detach()


def head_reference(weights, prefix, features):
    for number in (0, 2, 4, 6, 7):
        features = features @ weights[f"{prefix}{number}.weight"].T + weights[f"{prefix}{number}.bias"]
    return features[:, 0]


def test_clip_score_is_the_cosine_of_transformers_clip(places):
    logits, _, scale = clip_reference(places)
    torch.testing.assert_close(CLIPScore(places["clip"]).score(pictures(48, 48), PROMPTS), logits / scale.exp())


def test_pickscore_is_the_logit_of_transformers_clip(places):
    logits, _, scale = clip_reference(places)
    assert scale.item() == 3
    torch.testing.assert_close(PickScore(places["clip"]).score(pictures(48, 48), PROMPTS), logits)


def test_aesthetic_score_regresses_on_the_unit_embedding(places):
    _, embeddings, _ = clip_reference(places)
    assert embeddings.norm(dim=-1) == pytest.approx(1)
    expected = head_reference(torch.load(places["head"], weights_only=True), "layers.", embeddings)
    torch.testing.assert_close(
        AestheticScore(places["clip"], places["head"]).score(pictures(48, 48), PROMPTS), expected
    )


def test_hpsv2_is_the_cosine_of_open_clip(places):
    import open_clip

    network = open_clip.create_model(places["architecture"], load_weights=False).eval()
    network.load_state_dict(torch.load(places["hps"], weights_only=True)["state_dict"])
    with torch.no_grad():
        image, text, _ = network(normalized(pictures(48, 48)), open_clip.get_tokenizer(places["architecture"])(TEXTS))
    expected = (F.normalize(image, dim=-1) * F.normalize(text, dim=-1)).sum(-1)
    scores = HPSv2(places["hps"], architecture=places["architecture"]).score(pictures(48, 48), PROMPTS)
    torch.testing.assert_close(scores, expected)


def attention(queries, keys, values, mask=None):
    """One head of width 64, as all heads of the tiny networks."""
    logits = queries @ keys.transpose(-1, -2) / 8
    return (logits if mask is None else logits + mask).softmax(-1) @ values


def image_reward_reference(w, images, ids, mask):
    """ImageReward written down from its parts: a pre-norm vision transformer and a post-norm BERT that reads it."""

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(name, x, epsilon):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], epsilon)

    v = "blip.visual_encoder"
    patches = F.conv2d(images, w[f"{v}.patch_embed.proj.weight"], w[f"{v}.patch_embed.proj.bias"], stride=16)
    seen = torch.cat([w[f"{v}.cls_token"].expand(len(images), -1, -1), patches.flatten(2).transpose(1, 2)], 1)
    seen = seen + w[f"{v}.pos_embed"]
    for i in range(2):
        block = f"{v}.blocks.{i}"
        q, k, value = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", seen, 1e-6)).chunk(3, -1)
        seen = seen + linear(f"{block}.attn.proj", attention(q, k, value))
        inner = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", seen, 1e-6)))
        seen = seen + linear(f"{block}.mlp.fc2", inner)
    seen = norm(f"{v}.norm", seen, 1e-6)

    t = "blip.text_encoder"
    words = w[f"{t}.embeddings.word_embeddings.weight"][ids]
    places = w[f"{t}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    read = norm(f"{t}.embeddings.LayerNorm", words + places, 1e-12)
    hidden = torch.where(mask.bool(), 0.0, -torch.inf)[:, None, :]
    for i in range(2):
        layer = f"{t}.encoder.layer.{i}"
        for kind, other, blocked in (("attention", None, hidden), ("crossattention", seen, None)):
            source = read if other is None else other
            q = linear(f"{layer}.{kind}.self.query", read)
            k, value = (linear(f"{layer}.{kind}.self.{part}", source) for part in ("key", "value"))
            out = linear(f"{layer}.{kind}.output.dense", attention(q, k, value, blocked))
            read = norm(f"{layer}.{kind}.output.LayerNorm", read + out, 1e-12)
        out = linear(f"{layer}.output.dense", F.gelu(linear(f"{layer}.intermediate.dense", read)))
        read = norm(f"{layer}.output.LayerNorm", read + out, 1e-12)
    return (head_reference(w, "mlp.layers.", read[:, 0]) - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_its_networks_written_down(places):
    ids = torch.zeros(5, 35, dtype=torch.long)
    for row, text in enumerate(TEXTS):
        words = ["[CLS]", *text.split(), "[SEP]"]
        ids[row, : len(words)] = torch.tensor([published.WORDS.index(word) for word in words])
    expected = image_reward_reference(
        published.image_reward_weights(), normalized(pictures(48, 48)), ids, (ids > 0).long()
    )
    assert expected.std() > 1e-3
    scores = ImageReward(places["image_reward"], places["bert"]).score(pictures(48, 48), PROMPTS)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)


def test_image_reward_of_the_published_sizes_has_the_published_number_of_weights():
    with torch.device("meta"):
        network = build(published_sizes(), "reward", "file")
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in network.items()}
    assert counts["vision"] == 303_301_632, "ViT-L/16 at 224, without a classifier"
    bert = 109_482_240 - 590_592 + 2 * 768 - 2 * 768  # BERT-base: no pooler, two words more, no token types
    attending = 2 * (768 * 768 + 768) + 2 * (1024 * 768 + 768) + 2 * 768  # to the picture, in each layer
    assert counts["text"] == bert + 12 * attending


def test_image_reward_ignores_the_heads_of_pretraining():
    assert not [
        key for key in renamed(published.image_reward_weights()) if not key.startswith(("vision", "text", "head"))
    ]


@pytest.mark.parametrize("name", NAMES)
def test_score_does_not_depend_on_the_batch_or_the_order(places, name):
    images = pictures(60, 70)
    whole = MADE[name](places).score(images, PROMPTS)
    assert whole.dtype == torch.float32
    assert whole.shape == (5,)
    assert whole.unique().numel() == 5
    parts = MADE[name](places, batch_size=2)
    torch.testing.assert_close(parts.score(images, PROMPTS), whole, atol=1e-6, rtol=1e-5)
    order = [3, 0, 4, 2, 1]
    shuffled = parts.score(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], atol=1e-6, rtol=1e-5)
    alone = torch.cat([parts.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(alone, whole, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_reaches_the_picture_and_equals_finite_differences(places, name):
    reward = MADE[name](places)
    images = (0.2 + 0.6 * pictures(52, 40, 2)).requires_grad_()
    checked_score(reward, images, PROMPTS[:2]).sum().backward()
    direction = images.grad / images.grad.norm()
    step = 0.05
    with torch.no_grad():
        up, down = (checked_score(reward, images + sign * step * direction, PROMPTS[:2]).sum() for sign in (1, -1))
    assert ((up - down) / (2 * step)).item() == pytest.approx(images.grad.norm().item(), rel=0.02)
    assert not any(weight.requires_grad for weight in reward.network.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_score_of_plain_pictures_keeps_no_graph(places, name):
    assert MADE[name](places).score(pictures(48, 48), PROMPTS).grad_fn is None


def precisions(network):
    """The precisions of a network's weights, and of its head's, if it has one."""
    weights = dict(network.named_parameters())
    head = {weight.dtype for key, weight in weights.items() if key.startswith("head.")}
    return {weight.dtype for key, weight in weights.items() if not key.startswith("head.")}, head


@pytest.mark.parametrize("name", NAMES)
def test_weights_in_bfloat16_score_nearly_the_same_in_float32(places, name):
    exact, rounded = (MADE[name](places, dtype=dtype) for dtype in ("float32", "bfloat16"))
    expected, scores = exact.score(pictures(48, 48), PROMPTS), rounded.score(pictures(48, 48), PROMPTS)
    assert scores.dtype == torch.float32
    assert precisions(rounded.network) == precisions(rounded.sketch())
    assert 0 < ((scores - expected) / expected.abs().clamp(min=1)).abs().max() < 0.25


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("no_network")
def test_loading_from_a_path_opens_no_socket(places, name):
    MADE[name](places).score(pictures(48, 48), PROMPTS)


@pytest.mark.parametrize("name", NAMES)
def test_sketch_has_the_networks_weights_on_the_meta_device(places, name):
    reward = MADE[name](places)
    sketch = dict(reward.sketch().named_parameters())
    assert {weight.device.type for weight in sketch.values()} == {"meta"}
    weights = dict(reward.network.named_parameters())
    assert {key: weight.shape for key, weight in sketch.items()} == {
        key: weight.shape for key, weight in weights.items()
    }


def pil(images):
    return [Image.fromarray((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for image in images]


@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 96), (100, 61), (30, 40), (50, 74)])
def test_center_crop_is_that_of_clips_processor_up_to_its_rounding(height, width):
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48})
    expected = processor(pil(pictures(height, width)), return_tensors="pt").pixel_values
    difference = (normalized(center_crop(pictures(height, width), 48)) - expected).abs() * min(CLIP_STD) * 255
    assert difference.max() <= 1.5, "levels of 8 bits"


@pytest.mark.parametrize(("height", "width"), [(48, 48), (64, 96), (101, 60), (30, 40)])
def test_pad_square_is_that_of_hpsv2_up_to_rounding(height, width):
    scale = 48 / max(height, width)
    small = round(height * scale), round(width * scale)
    made = pad_square(pictures(height, width), 48)
    for picture, ours in zip(pil(pictures(height, width)), made, strict=True):
        square = Image.new("RGB", (48, 48))
        square.paste(
            picture.resize(small[::-1], Image.Resampling.BICUBIC), ((48 - small[1]) // 2, (48 - small[0]) // 2)
        )
        levels = np.asarray(square).astype(float).transpose(2, 0, 1)
        assert np.abs(ours.numpy() * 255 - levels).max() <= 1.5


@pytest.mark.parametrize("name", NAMES)
def test_sketch_has_the_precision_of_the_weights(places, name):
    head = {torch.float32} if name in ("aesthetic", "image_reward") else set()
    assert precisions(MADE[name](places, dtype="bfloat16").sketch()) == ({torch.bfloat16}, head)


@pytest.mark.parametrize("name", ["aesthetic", "image_reward"])
def test_pictures_have_scores_of_their_own_in_bfloat16(places, tmp_path, name):
    """The published aesthetic head gives about 5.6, where bfloat16 has steps of 1/32."""
    file = {"aesthetic": "head", "image_reward": "image_reward"}[name]
    weights = torch.load(places[file], weights_only=True)
    weights[next(key for key in weights if key.endswith("layers.7.bias"))].fill_(5.6)
    torch.save(weights, tmp_path / "w.pt")
    reward = MADE[name]({**places, file: str(tmp_path / "w.pt")}, dtype="bfloat16")
    images = pictures(48, 48, 32) * torch.linspace(0.1, 1, 32)[:, None, None, None]
    assert len(reward.score(images, [Prompt("a red circle")] * 32).unique()) >= 30


def test_distinct_texts_keep_their_order():
    assert distinct(["b", "a", "b"]) == (["b", "a"], [0, 1, 0])


def test_constants_that_older_versions_saved_are_no_weights_too_many(places, tmp_path):
    old = shutil.copytree(places["clip"], tmp_path / "clip")
    tensors = load_file(old / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    scores = [CLIPScore(str(path)).score(pictures(48, 48), PROMPTS) for path in (old, places["clip"])]
    assert torch.equal(*scores)


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_weights_that_are_code_are_refused_and_not_run(places, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"weight": Code()}}, "HPS_v2.1_compressed.pt")
    with pytest.raises(UserError, match=r"^reward 'hpsv2': '.*HPS_v2.1_compressed.pt' cannot be read: it holds more"):
        HPSv2(str(tmp_path), architecture=places["architecture"])
    assert not (tmp_path / "executed").exists()


BROKEN = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-2000]), "cannot be read: "),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read: "),
    "text": (lambda file: file.write_text("not found"), "cannot be read: "),
    "no names": (lambda file: torch.save([torch.zeros(1)], file), "holds no weights by name"),
    "absent": (lambda file: file.unlink(), "there is no file"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "image_reward"])
def test_broken_weights_are_refused_before_anything_is_loaded(places, tmp_path, name, kind):
    key = {"hpsv2": "hps", "aesthetic": "head", "image_reward": "image_reward"}[name]
    file = tmp_path / "weights.pt"
    shutil.copy(places[key], file)
    breaking, message = BROKEN[kind]
    breaking(file)
    with pytest.raises(UserError, match=rf"^reward '{name}': .*{message}") as refused:
        MADE[name]({**places, key: str(file)})
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("path", ["w/x.pt", "w/x.pth", "w/x.bin", "w/x.ckpt", "w/x.safetensors", "a/b/c"])
@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "image_reward"])
@pytest.mark.usefixtures("no_network")
def test_missing_file_under_a_relative_path_is_not_asked_of_the_hub(places, name, path):
    key = {"hpsv2": "hps", "aesthetic": "head", "image_reward": "image_reward"}[name]
    with pytest.raises(UserError, match=rf"^reward '{name}': there is no file '{path}'; give "):
        MADE[name]({**places, key: path})


@pytest.mark.parametrize("name", ["hpsv2", "aesthetic", "image_reward"])
@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_weights_of_another_network_are_refused(places, tmp_path, name, change):
    key = {"hpsv2": "hps", "aesthetic": "head", "image_reward": "image_reward"}[name]
    tensors = torch.load(places[key], weights_only=True)
    tensors = tensors.get("state_dict", tensors)
    last = list(tensors)[-1]
    if change == "missing":
        del tensors[last]
    else:
        tensors["other" if change == "unexpected" else last] = torch.zeros(3, 3, 3)
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "weights.safetensors")
    reward = MADE[name]({**places, key: str(tmp_path / "weights.safetensors")})
    with pytest.raises(UserError, match=rf"the weights in .* are not those of this network: 1 {change}, the first "):
        reward.score(pictures(48, 48), PROMPTS)


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("blip.visual_encoder.patch_embed.proj.weight", (32, 3, 16, 16)),
        ("blip.visual_encoder.patch_embed.proj.weight", (64,)),
        ("blip.visual_encoder.patch_embed.proj.weight", (64, 3, 0, 0)),
        ("blip.visual_encoder.pos_embed", (64,)),
        ("blip.visual_encoder.blocks.0.mlp.fc1.bias", ()),
        ("blip.text_encoder.embeddings.word_embeddings.weight", (64,)),
        ("blip.text_encoder.embeddings.word_embeddings.weight", (12, 96)),
        ("blip.text_encoder.embeddings.position_embeddings.weight", ()),
    ],
)
def test_image_reward_weights_of_impossible_sizes_are_refused_in_one_line(places, key, shape):
    weights = renamed(torch.load(places["image_reward"], weights_only=True) | {key: torch.zeros(shape)})
    with pytest.raises(UserError) as refused:
        build(weights, "here", "x.pt")
    assert str(refused.value).startswith("here: the weights in 'x.pt' are not those of ImageReward: '")
    assert str(refused.value).endswith(f"is of shape {shape}; save or download it again")


def test_weights_in_safetensors_score_the_same(places, tmp_path):
    tensors = torch.load(places["image_reward"], weights_only=True)
    save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "weights.safetensors")
    scores = [
        ImageReward(str(path), places["bert"]).score(pictures(48, 48), PROMPTS)
        for path in (tmp_path / "weights.safetensors", places["image_reward"])
    ]
    assert torch.equal(*scores)


def test_hub_id_is_downloaded_when_the_reward_is_used_and_not_before(places, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *names: asked.append(names) or places["hps"])
    reward = HPSv2("xswu/HPSv2", architecture=places["architecture"])
    assert not asked
    reward.score(pictures(48, 48), PROMPTS)
    assert asked == [("xswu/HPSv2", "HPS_v2.1_compressed.pt")]


def test_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=r"^reward 'hpsv2': 'xswu/HPSv2' is not on this machine") as refused:
        weights.find_file("xswu/HPSv2", "absent.pt", "reward 'hpsv2'")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"version": "v3"}, "HPSv2.version: it is 'v3'; use v2 or v2.1"),
        ({"architecture": "ViT-H"}, "HPSv2.architecture: it is 'ViT-H'; use one of open_clip.list_models(), "),
        ({"dtype": "float8"}, "HPSv2.dtype: it is 'float8'; use float32, bfloat16, float16"),
        ({"batch_size": 0}, "HPSv2.batch_size: it is 0"),
    ],
)
def test_wrong_setting_is_named(places, options, expected):
    with pytest.raises(UserError) as refused:
        HPSv2(places["hps"], **options)
    assert str(refused.value).startswith(expected)


def written(text: str, size: int = 40) -> torch.Tensor:
    picture = Image.new("RGB", (420, 120), (250, 250, 245))
    ImageDraw.Draw(picture).text((25, 30), text, (20, 30, 120), ImageFont.load_default(size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def ocr():
    return OCRReward()


@pytest.mark.usefixtures("no_network")
def test_ocr_reads_rendered_text(ocr):
    prompts = [
        Prompt('a sign that says "Open 24 hours"'),
        Prompt('a sign that says "Help"'),
        Prompt("a", {"text": "zzz"}),
    ]
    pictures = written("OPEN 24 HOURS").expand(3, -1, -1, -1)
    assert checked_score(ocr, pictures, prompts).tolist() == pytest.approx([1, 0, 0])
    assert checked_score(ocr, torch.ones(1, 3, 64, 64), prompts[:1]).item() == 0


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_ocr_wants_the_quoted_text_of_prompts_under_the_key_text(ocr, tmp_path, name):
    (tmp_path / name).write_text('[{"text": "it says \\"open\\""}]'.strip("[]" if name == "p.jsonl" else ""))
    (prompt,) = open_source(str(tmp_path / name), column="text").read()
    assert wanted(prompt) == "open"
    (tmp_path / name).write_text('[{"text": "a sign"}]'.strip("[]" if name == "p.jsonl" else ""))
    with pytest.raises(UserError, match="prompt 'a sign' asks for no text"):
        ocr.check(list(open_source(str(tmp_path / name), column="text").read()))


def test_ocr_refuses_a_prompt_without_text(ocr):
    ocr.check([Prompt("it says “yes”")])
    with pytest.raises(UserError, match=r"^reward 'ocr': prompt 'a sign' asks for no text; put the text in double"):
        ocr.check([Prompt("a sign")])


@pytest.mark.parametrize(
    ("target", "found", "score"),
    [
        ("abcd", "abcd", 1),
        ("Ab cd", "x A BCD y", 1),
        ("abcd", "abxd", 0.75),
        ("abcd", "abd", 0.75),
        ("abcd", "", 0),
        ("ab", "completely different", 0),
        ("abcd", "xabxcdx", 0.25),
    ],
)
def test_similarity_counts_letters(target, found, score):
    assert similarity(target, found) == score


WRONG = {
    "bytes": (
        lambda x: (x * 255).byte(),
        "pictures are uint8 of shape (5, 3, 48, 48); give floats of ",
    ),
    "gray": (lambda x: x[:, :1], "pictures are float32 of shape (5, 1, 48, 48); "),
    "one": (lambda x: x[0], "pictures are float32 of shape (3, 48, 48); "),
    "levels": (lambda x: x * 255, "5 of 5 pictures are out of range: 0 to 255, the first with prompt 'a red circle'; "),
    "signed": (lambda x: 2 * x - 1, "5 of 5 pictures are out of range: -1 to 1, "),
    "fewer": (lambda x: x[:4], "4 pictures and 5 prompts; give one prompt for each picture"),
    "none": (lambda x: x[:0], "0 pictures and 5 prompts; "),
}


@pytest.mark.parametrize("kind", WRONG)
def test_pictures_that_are_none_are_refused_in_one_line(places, ocr, kind):
    change, expected = WRONG[kind]
    include = [{"class": "circle", "count": 1}]
    quoted = [Prompt(prompt.text, {"text": "a", "include": include}) for prompt in PROMPTS]
    for reward in (CLIPScore(places["clip"]), ocr, ShapesReward(), GenEvalReward(ShapesDetector())):
        with pytest.raises(UserError) as refused:
            reward.score(change(pictures(48, 48)), quoted)
        assert str(refused.value).startswith(f"reward '{reward.name}': {expected}")


def test_rounding_errors_of_pixels_are_accepted(places):
    CLIPScore(places["clip"]).score(pictures(48, 48) * 1.0005, PROMPTS)


def test_contrastive_reward_crops_the_middle_as_clip_does(places):
    wide = pictures(48, 80)
    scorer = ContrastiveReward(places["clip"])
    assert torch.equal(scorer.score(wide, PROMPTS), scorer.score(wide[..., 16:64], PROMPTS))
