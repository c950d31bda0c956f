"""Answers of a tiny Qwen3-VL against the procedure of the original, and GenEval 2 as reward and score."""

import published_qwen
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.answers import Answers, QwenVLAnswers
from gdmd_lightning.geneval.questions import questions_of
from gdmd_lightning.metrics.geneval2 import GenEval2Score
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import checked_score
from gdmd_lightning.rewards.geneval2 import GenEval2Reward


def prompt(text: str, *asked: tuple[str, str, str], **metadata: object) -> Prompt:
    pairs = [[question, answer] for question, answer, _ in asked]
    return Prompt(text, {"prompt": text, "vqa_list": pairs, "skills": [skill for *_, skill in asked], **metadata})


RED = ("Is the circle red?", "Yes", "attribute")
PROMPTS = [
    prompt("two red", ("How many circle are in the image?", "two", "count"), RED, tag="2"),
    prompt("a circle", ("Is a circle in the image?", "Yes", "object"), tag="1"),
    prompt("one red", RED, ("How many are red?", "one", "count"), ("Is it?", "Yes", "object"), tag="2"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return str(published_qwen.save_qwen3_vl(tmp_path_factory.mktemp("qwen")))


@pytest.fixture(scope="module")
def answers(place):
    return QwenVLAnswers(place, "float32")


def pictures(height: int = 32, width: int = 24, count: int = 3) -> torch.Tensor:
    coarse = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1) * 255).round() / 255


def original(place: str, images: torch.Tensor) -> list[list[float]]:
    """Probability of every right answer from ``generate``, one question at a time, as GenEval 2 computes it."""
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    processor = AutoProcessor.from_pretrained(place)
    model = Qwen3VLForConditionalGeneration.from_pretrained(place).eval()
    found = []
    for image, each in zip(images, PROMPTS, strict=True):
        picture = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
        found.append([])
        for question in questions_of(each):
            text = {"type": "text", "text": f"{question.text} Answer in one word."}
            message = [{"role": "user", "content": [{"type": "image", "image": picture}, text]}]
            options = {"tokenize": True, "add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
            inputs = processor.apply_chat_template(message, **options)
            scores = {"output_scores": True, "return_dict_in_generate": True}
            out = model.generate(**inputs, max_new_tokens=1, do_sample=False, **scores)
            chances = out.scores[0][0].softmax(-1)
            tokens = [processor.tokenizer.encode(spelling)[0] for spelling in question.spellings]
            found[-1].append(sum(chances[token].item() for token in tokens))
    return found


def test_probabilities_are_those_of_the_original_procedure(place, answers):
    found = answers.log_probabilities(pictures(), [questions_of(each) for each in PROMPTS])
    expected = original(place, pictures())
    assert len({round(p, 6) for mine in expected for p in mine}) == 6
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.exp(), torch.tensor(theirs), atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("no_network")
def test_loading_from_a_path_opens_no_socket(place):
    QwenVLAnswers(place, "float32").log_probabilities(pictures(count=1), [questions_of(PROMPTS[0])])


def test_large_and_small_pictures_are_resized_as_by_the_processor(place):
    """The processor rounds resized pictures to 8 bits; here nothing is rounded."""
    from transformers import AutoProcessor

    from gdmd_lightning.families.qwen_vl import patches

    processor = AutoProcessor.from_pretrained(place).image_processor
    for (height, width), bound in (((32, 24), 1e-3), ((100, 130), 1.5), ((9, 15), 2.5)):
        images = pictures(height, width)
        pil = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
        expected = processor(pil, return_tensors="pt")
        found, grid = patches(images, processor, 256, 4096)
        assert grid.tolist() == expected["image_grid_thw"].tolist()
        levels = 255 * (found - expected["pixel_values"]).abs().unflatten(1, (3, -1)).amax((0, 2))
        levels = (levels * torch.tensor(processor.image_std)).max()
        assert levels < bound, (height, width, levels)


@pytest.mark.parametrize("mean", ["geometric", "arithmetic"])
def test_score_does_not_depend_on_the_batch_or_the_order(place, answers, mean):
    whole = GenEval2Reward(answers, mean).score(pictures(), PROMPTS)
    assert whole.dtype == torch.float32
    assert whole.unique().numel() == 3
    parts = GenEval2Reward(QwenVLAnswers(place, "float32", batch_size=2), mean)
    torch.testing.assert_close(parts.score(pictures(), PROMPTS), whole, atol=1e-6, rtol=1e-5)
    order = [2, 0, 1]
    shuffled = parts.score(pictures()[order], [PROMPTS[i] for i in order])
    torch.testing.assert_close(shuffled, whole[order], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 16])
def test_a_picture_is_encoded_once_for_all_of_its_questions(place, answers, batch_size):
    """Its questions may be in several batches."""
    mine, grids = QwenVLAnswers(place, "float32", batch_size=batch_size), []
    tower = mine._model().model.visual
    encode = tower.patch_embed.register_forward_hook(lambda module, args, out: grids.append(len(out)))
    questions = [questions_of(each) for each in PROMPTS]
    found = mine.log_probabilities(pictures(), questions)
    encode.remove()
    patches_of_a_picture = 8 * 6
    assert sum(grids) == len(PROMPTS) * patches_of_a_picture
    assert len(grids) <= -(-6 // batch_size)
    for one, other in zip(found, answers.log_probabilities(pictures(), questions), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
    assert "forward" not in vars(tower)


def test_gradient_is_that_of_finite_differences(answers):
    reward, images = GenEval2Reward(answers), pictures(16, 16, 1).requires_grad_()
    checked_score(reward, images, PROMPTS[:1]).sum().backward()
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        inside = images.clamp(0.1, 0.9)
        ends = [reward.score(inside + step * direction, PROMPTS[:1]).double() for step in (1e-3, -1e-3)]
    images = inside.clone().requires_grad_()
    reward.score(images, PROMPTS[:1]).sum().backward()
    assert (images.grad * direction).sum() == pytest.approx(float(ends[0] - ends[1]) / 2e-3, rel=2e-2)


class Known(Answers):
    """Answers with probabilities that are the pixels of a picture."""

    def log_probabilities(self, images, questions):
        return [image.flatten()[: len(mine)].log() for image, mine in zip(images, questions, strict=True)]


def test_score_reports_atom_counts_and_skills():
    p = torch.tensor([[0.5, 0.125, 1.0], [0.25, 1.0, 1.0], [1.0, 1.0, 0.125]])
    images = torch.ones(3, 3, 2, 2)
    images.view(3, -1)[:, :3] = p
    score = GenEval2Score(Known())
    score.begin(PROMPTS)
    score.update(images[:2], PROMPTS[:2])
    score.update(images[2:], PROMPTS[2:])
    found = {name: value.item() for name, value in score.compute().items()}
    assert found == pytest.approx(
        {
            "2": (0.25 + 0.5) / 2,
            "1": 0.25,
            "overall": (0.375 + 0.25) / 2,
            "skill/count": (0.5 + 1) / 2,
            "skill/attribute": (0.125 + 1) / 2,
            "skill/object": (0.25 + 0.125) / 2,
        }
    )
    score.begin(PROMPTS[1:2])
    score.update(images[1:2], PROMPTS[1:2])
    assert set(score.compute()) == {"overall", "1", "skill/object"}


def test_score_checks_what_the_model_answers():
    class Broken(Answers):
        def log_probabilities(self, images, questions):
            return [torch.full((len(mine),), torch.nan) for mine in questions]

    score = GenEval2Score(Broken())
    score.begin(PROMPTS)
    with pytest.raises(
        UserError, match=r"^reward 'geneval2': returned nan for 3 of 3 pictures, the first with prompt "
    ):
        score.update(pictures(), PROMPTS)


def test_score_and_reward_refuse_other_prompts_before_any_picture():
    for ask in (GenEval2Score(Known()).begin, GenEval2Reward(Known()).check):
        with pytest.raises(UserError, match=r"^reward 'geneval2': prompt 'a' has no GenEval 2 questions; "):
            ask([Prompt("a")])


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda place, empty: QwenVLAnswers(str(empty)), r"GenEval 2's answers: .* has no config\.json; "),
        (lambda place, empty: GenEval2Reward(Known(), "harmonic"), r"GenEval2Reward\.mean: it is 'harmonic'; "),
        (lambda place, empty: QwenVLAnswers(place, "float8"), r"QwenVLAnswers\.dtype: it is 'float8'; use float32"),
    ],
)  # fmt: skip
def test_wrong_settings_are_one_line(place, tmp_path, make, expected):
    with pytest.raises(UserError, match=f"^{expected}"):
        make(place, tmp_path)


def test_model_without_a_chat_template_or_with_missing_weights_is_refused(place, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    (copy / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="GenEval 2's answers: "):
        QwenVLAnswers(str(copy)).prepare()
    (copy / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="is a model of type 'clip'; give a Qwen-VL directory"):
        QwenVLAnswers(str(copy))


def test_question_with_a_token_of_its_own_meaning_is_refused(answers):
    asked = prompt("x", ("Is <|image_pad|> there?", "Yes", "object"))
    with pytest.raises(UserError, match=r"prompt 1 of the batch contains the token <\|image_pad\|>; remove it"):
        answers.log_probabilities(pictures(count=1), [questions_of(asked)])


def test_network_moves_to_the_device(place):
    one, meta = QwenVLAnswers(place, "float32"), torch.device("meta")
    one.prepare()
    one.to(meta)
    assert {weight.device for weight in one._model().parameters()} == {meta}


def test_sketch_has_the_networks_parameters_on_the_meta_device(answers):
    sketch = answers.sketch()
    assert {p.device.type for p in sketch.parameters()} == {"meta"}
    assert sum(p.numel() for p in sketch.parameters()) == sum(p.numel() for p in answers._model().parameters())
