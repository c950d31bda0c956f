"""HPSv3 on a tiny Qwen2-VL against its formula, computed straight from transformers as the original does."""

import published_qwen
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import checked_score
from gdmd_lightning.rewards.hpsv3 import HPSv3, read_instruction

TEXTS = ["a red circle", "one", "a red circle, two one two in the image"]
PROMPTS = [Prompt(text) for text in TEXTS]
BEFORE, AFTER = "Rate the image {of}.\nprompt - {text_prompt}\n\n", "\nrating: <|Reward|>\n\nend\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    directory = published_qwen.save_qwen2_vl(tmp_path_factory.mktemp("qwen"))
    save_file(published_qwen.hpsv3_weights(directory), directory / "HPSv3.safetensors")
    (directory / "instruction.txt").write_text(BEFORE + AFTER)
    return directory


@pytest.fixture(scope="module")
def make(place):
    def made(**options):
        options = {
            "processor": str(place),
            "instruction": str(place / "instruction.txt"),
            "dtype": "float32",
            **options,
        }
        return HPSv3(str(options.pop("path", place)), **options)

    return made


@pytest.fixture(scope="module")
def reward(make):
    return make()


def pictures(height: int = 448, width: int = 448) -> torch.Tensor:
    coarse = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255


@torch.no_grad()
def original(place, images: torch.Tensor) -> torch.Tensor:
    """Picture features put into the embeddings, the language model without positions, the head at the token."""
    from transformers import AutoProcessor, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(place)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|Reward|>"]})
    config = Qwen2VLConfig.from_pretrained(place)
    config.text_config.vocab_size = len(processor.tokenizer)
    model, weights = Qwen2VLForConditionalGeneration(config).eval(), published_qwen.hpsv3_weights(place)
    new = {key: value for key, value in weights.items() if not key.startswith("rm_head")}
    for old, name in (("model.", "model.language_model."), ("visual.", "model.visual.")):
        new = {(name + key.removeprefix(old) if key.startswith(old) else key): value for key, value in new.items()}
    model.load_state_dict(new)
    found = []
    for image, text in zip(images, TEXTS, strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).resize(
            (448, 448), Image.BICUBIC
        )
        content = [{"type": "image"}, {"type": "text", "text": BEFORE.replace("{text_prompt}", text) + AFTER}]
        chat = [{"role": "user", "content": content}]
        whole = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[whole], images=[picture], return_tensors="pt")
        embedded = model.get_input_embeddings()(inputs.input_ids)
        seen = torch.cat(model.get_image_features(inputs.pixel_values, inputs.image_grid_thw).pooler_output)
        embedded[inputs.input_ids == config.image_token_id] = seen
        hidden = model.model.language_model(inputs_embeds=embedded, attention_mask=inputs.attention_mask)[0]
        read = hidden[inputs.input_ids == processor.tokenizer.convert_tokens_to_ids("<|Reward|>")]
        for number in (0, 3, 5):
            read = F.linear(read, weights[f"rm_head.{number}.weight"], weights[f"rm_head.{number}.bias"])
            read = read if number == 5 else read.relu()
        found.append(read[0, 0])
    return torch.stack(found)


def test_score_is_the_mean_of_the_original_formula(place, reward):
    expected = original(place, pictures())
    assert expected.std() > 1e-2
    torch.testing.assert_close(reward.score(pictures(), PROMPTS), expected, atol=1e-5, rtol=1e-5)


def test_picture_of_another_size_differs_by_rounding_only(place, reward):
    """The original rounds the resized picture to 8 bits."""
    expected = original(place, pictures(512, 512))
    found = reward.score(pictures(512, 512), PROMPTS)
    assert 0 < (found - expected).abs().max() < 0.02 * expected.std()


def test_pictures_get_as_many_pixels_as_the_original_gives_them(reward):
    from gdmd_lightning.families.qwen_vl import patches

    images = reward._loaded_processor().image_processor
    images.patch_size = 14  # as published
    for side in (224, 448, 512, 1024):
        _, grid = patches(torch.zeros(1, 3, side, side), images, 256 * 28 * 28, 256 * 28 * 28)
        assert grid.tolist() == [[1, 32, 32]], side


def test_score_does_not_depend_on_the_batch_or_the_order(make, reward):
    images, whole = pictures(300, 400), reward.score(pictures(300, 400), PROMPTS)
    assert whole.dtype == torch.float32
    assert whole.unique().numel() == 3
    parts = make(batch_size=2)
    torch.testing.assert_close(parts.score(images, PROMPTS), whole, atol=1e-6, rtol=1e-5)
    order = [2, 0, 1]
    shuffled = parts.score(images[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], atol=1e-6, rtol=1e-5)


def test_gradient_is_that_of_finite_differences(make):
    """In float64: the random network is so curved that float32 has no step for it; its norms stay in float32."""
    reward = make()
    network, text = reward.network.double(), TEXTS[:1]
    images = pictures(300, 300)[:1].double().clamp(0.1, 0.9).requires_grad_()
    reward.judge(network, images, text).sum().backward()
    direction = images.grad.sign()
    with torch.no_grad():
        ends = [reward.judge(network, images + step * direction, text).item() for step in (1e-6, -1e-6)]
    assert (images.grad * direction).sum().item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=3e-2)


def test_gradient_reaches_the_pictures_and_plain_pictures_keep_no_graph(reward):
    images = pictures().requires_grad_()
    checked_score(reward, images, PROMPTS).sum().backward()
    assert all(each.abs().max() > 0 for each in images.grad)
    assert not reward.score(pictures(), PROMPTS).requires_grad


@pytest.mark.usefixtures("no_network")
def test_names_of_later_versions_load_too_and_nothing_touches_the_network(place, make, reward, tmp_path):
    later = {
        f"model.{key}" if key.startswith("visual.") else key.replace("model.", "model.language_model."): value
        for key, value in published_qwen.hpsv3_weights(place).items()
    }
    save_file(later, tmp_path / "HPSv3.safetensors")
    scores = make(path=tmp_path).score(pictures(), PROMPTS)
    assert torch.equal(scores, reward.score(pictures(), PROMPTS))


def test_weights_in_bfloat16_keep_the_head_in_float32(make, reward):
    half = make(dtype="bfloat16")
    kinds = {name: {p.dtype for p in part.parameters()} for name, part in half.network.items()}
    assert kinds == {"backbone": {torch.bfloat16}, "head": {torch.float32}}
    found, expected = half.score(pictures(), PROMPTS), reward.score(pictures(), PROMPTS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.3 * expected.std().item(), rtol=0)


def test_sketch_has_the_networks_sizes(reward):
    sketch = reward.sketch()
    assert {p.device.type for p in sketch.parameters()} == {"meta"}
    embedding = 19 * 32  # the configuration's vocabulary has 20 words more, and lacks the token of the reward
    assert (
        sum(p.numel() for p in sketch.parameters()) == sum(p.numel() for p in reward.network.parameters()) + embedding
    )


def test_instruction_is_read_from_the_originals_file_without_running_it(place, tmp_path):
    file = tmp_path / "data_collator_qwen.py"
    assign = f"INSTRUCTION = {BEFORE!r}\nprompt_with_special_token = '''{AFTER}'''\n"
    file.write_text(f"import nowhere\nraise SystemExit\n{assign}OTHER = len('x')\n")
    assert read_instruction(str(file), "x") == read_instruction(str(place / "instruction.txt"), "x") == BEFORE + AFTER


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (None, "", "the instruction is not set; download hpsv3/dataset/data_collator_qwen.py from github.com/MizzenAI"),
        ("absent.txt", None, "cannot be read: "),
        ("i.txt", "rate {text_prompt}", "has 0 times <|Reward|>, not once; download "),
        ("i.txt", "{text_prompt} {text_prompt} <|Reward|>", "has 2 times {text_prompt}, not once; "),
        ("i.py", "INSTRUCTION = '{text_prompt}'", "cannot be read: 'prompt_with_special_token'; "),
        ("i.py", "INSTRUCTION = open('x').read()", "cannot be read: malformed node"),
        ("i.py", "INSTRUCTION = (", "cannot be read: "),
        ("i.py", "INSTRUCTION = 1\nprompt_with_special_token = 2", "cannot be read: sequence item 0"),
    ],
)
def test_missing_or_wrong_instruction_says_where_to_get_it(make, tmp_path, name, content, expected):
    if name is not None and content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as refused:
        make(instruction=None if name is None else str(tmp_path / name))
    assert str(refused.value).startswith("reward 'hpsv3': ")
    assert expected in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda w: w.pop("visual.blocks.0.norm1.bias"), "1 missing, the first visual.blocks.0.norm1.bias"),
        (lambda w: w.update({"model.extra": torch.zeros(1)}), "1 unexpected, the first language_model.extra"),
        (lambda w: w.update({"extra": torch.zeros(1)}), "1 unexpected, the first extra"),
        (
            lambda w: w.update({"model.norm.weight": torch.zeros(5)}),
            "1 mismatched, the first language_model.norm",
        ),
        (lambda w: w.pop("rm_head.5.bias"), "1 missing, the first 5.bias"),
        (lambda w: w.pop("model.embed_tokens.weight"), "has no words, and the processor with <|Reward|> "),
        (
            lambda w: w.update({"model.embed_tokens.weight": torch.zeros(7, 32)}),
            "has 7 words, and the processor with <|Reward|> ",
        ),
    ],
)
def test_weights_of_another_network_are_refused(place, make, tmp_path, change, expected):
    weights = published_qwen.hpsv3_weights(place)
    change(weights)
    save_file(weights, tmp_path / "HPSv3.safetensors")
    with pytest.raises(UserError) as refused:
        make(path=tmp_path).prepare()
    assert expected in str(refused.value)


def test_missing_files_are_refused_when_the_configuration_is_read(make, tmp_path):
    with pytest.raises(UserError, match=r"^reward 'hpsv3': there is no file .*; give HPSv3\.safetensors"):
        make(path=tmp_path)
    with pytest.raises(UserError, match=r"^reward 'hpsv3': .* has no config\.json; give a Qwen2-VL directory"):
        make(processor=str(tmp_path))


def test_prompt_with_the_token_of_the_reward_is_refused_before_and_while_scoring(reward):
    wrong = [PROMPTS[0], Prompt("a <|Reward|>"), PROMPTS[2]]
    for ask in (lambda: reward.check(wrong), lambda: reward.score(pictures(), wrong)):
        with pytest.raises(UserError, match=r"^reward 'hpsv3': prompt 'a <\|Reward\|>' contains the token <\|R"):
            ask()
    reward.check(PROMPTS)
