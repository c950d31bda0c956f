"""Directories of pictures, scored by anything, over prompts, and without scoring a picture twice."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from gdmd_lightning.cli import main
from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.answers import Answers
from gdmd_lightning.metrics.geneval2 import GenEval2Score
from gdmd_lightning.metrics.intervals import Interval
from gdmd_lightning.metrics.scores import RewardScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.streams import named_seed
from gdmd_lightning.studies import pipelines
from gdmd_lightning.studies.folders import read_folder, score_folder
from gdmd_lightning.studies.tasks import built_scores

GRAYS = {"0.png": 0, "1.png": 51, "2.png": 102, "3.png": 255}
TEXTS = {"0.png": "dark", "1.png": "dark", "2.png": "bright", "3.png": "bright"}


class Brightness(Reward):
    """Keeps the shapes of what it scores."""

    name = "brightness"

    def __init__(self):
        self._asked = []

    @property
    def asked(self):
        return self._asked

    def score(self, images, prompts):
        self.asked.append(tuple(images.shape))
        return images.mean((1, 2, 3))


class PixelAnswers(Answers):
    """Answers whose probabilities are the brightness of a picture, and half of it."""

    def __init__(self):
        self._asked = 0

    @property
    def asked(self):
        return self._asked

    def log_probabilities(self, images, questions):
        self._asked += len(images)
        chances = torch.tensor([1.0, 0.5, 1.0])
        return [(image.mean() * chances[: len(mine)]).log() for image, mine in zip(images, questions, strict=True)]


@pytest.fixture
def asked_folder(folder):
    """The same pictures, without the black one, with questions of GenEval 2: two on dark prompts, three on bright."""
    questions = {
        "dark": ([["Is it dark?", "Yes"], ["Is it red?", "Yes"]], ["object", "attribute"]),
        "bright": ([["Is it bright?", "Yes"], ["Is it red?", "Yes"], ["Is it?", "Yes"]], ["object"] * 3),
    }
    rows = []
    for name in ("1.png", "2.png", "3.png"):
        pairs, skills = questions[TEXTS[name]]
        rows.append({"file_name": name, "text": TEXTS[name], "vqa_list": pairs, "skills": skills})
    listed(folder, rows)
    return folder


@pytest.fixture
def folder(tmp_path):
    """Four gray pictures of two prompts, as an image folder; one has another size."""
    place = tmp_path / "pictures"
    place.mkdir()
    for name, gray in GRAYS.items():
        size = (6, 4) if name == "3.png" else (4, 4)
        Image.new("RGB", size, (gray, gray, gray)).save(place / name)
    listed(place, [{"file_name": name, "text": TEXTS[name], "tag": TEXTS[name]} for name in GRAYS])
    return place


def scored(folder, record, reward=None, **options):
    return all_scored(folder, record, [RewardScore(reward or Brightness())], **options)


def all_scored(folder, record, scores, **options):
    settings = {score.name: score.settings() for score in scores}
    return score_folder("x", read_folder(folder), scores, record, settings, **options)


def listed(folder, rows) -> None:
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_pictures_are_scored_in_batches_of_one_size_and_averaged_by_task(folder, tmp_path):
    reward = Brightness()
    found = scored(folder, tmp_path / "x.jsonl", reward, batch_size=2)
    assert reward.asked == [(2, 3, 4, 4), (1, 3, 4, 4), (1, 3, 4, 6)]
    assert (found.pictures, found.prompts) == (4, 2)
    means = {name: interval.mean for name, interval in found.scores.items()}
    assert means == pytest.approx(
        {"brightness/dark": 0.1, "brightness/bright": 0.7, "brightness/overall": 0.4}, abs=1e-6
    )


def test_scoring_continues_where_it_was_and_notices_a_changed_picture(folder, tmp_path, monkeypatch):
    def killed(self, images, prompts, whole=Brightness.score):
        if len(self.asked) == 1:
            raise KeyboardInterrupt
        return whole(self, images, prompts)

    record = tmp_path / "x.jsonl"
    with monkeypatch.context() as patched:
        patched.setattr(Brightness, "score", killed)
        with pytest.raises(KeyboardInterrupt):
            scored(folder, record, Brightness(), batch_size=2)
    reward = Brightness()
    whole = scored(folder, record, reward, batch_size=2)
    assert sum(shape[0] for shape in reward.asked) == 2
    again = Brightness()
    assert scored(folder, record, again) == whole == scored(folder, tmp_path / "fresh.jsonl")
    assert again.asked == []
    Image.new("RGB", (4, 4), (255, 255, 255)).save(folder / "0.png")
    changed = scored(folder, record, again)
    assert again.asked == [(1, 3, 4, 4)]
    assert changed.scores["brightness/dark"].mean == pytest.approx(0.6)


def test_record_of_other_scores_is_refused(folder, tmp_path):
    record, reward = tmp_path / "x.jsonl", Brightness()
    scored(folder, record)
    before = record.read_text()
    reward.scale = 2
    with pytest.raises(UserError, match=r"x\.jsonl: its score 'brightness' had other settings; remove it, or use ano"):
        scored(folder, record, reward)
    assert record.read_text() == before
    record.write_text("{}\n")
    with pytest.raises(UserError, match=r"x\.jsonl: not a record of scores; "):
        scored(folder, record)
    record.write_text('{"settings": "[]"}\n')
    with pytest.raises(UserError, match=r"x\.jsonl: it was written by an earlier version; remove it"):
        scored(folder, record)


def test_a_further_score_is_added_to_a_record_without_judging_the_others_again(folder, tmp_path):
    record, first, second = tmp_path / "x.jsonl", Brightness(), Brightness()
    alone = scored(folder, record, first)
    second.name = "light"
    first.asked.clear()
    both = [RewardScore(first), RewardScore(second)]
    found = all_scored(folder, record, both, batch_size=3)
    assert first.asked == []
    assert sum(shape[0] for shape in second.asked) == 4
    assert {name: found.scores[name] for name in alone.scores} == alone.scores
    assert found.scores["light/overall"] == found.scores["brightness/overall"]
    # And one of them alone keeps the other's values, and what it was, also where it writes.
    assert scored(folder, record, first) == alone
    assert all_scored(folder, record, both) == found
    assert first.asked == []
    Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "0.png")
    scored(folder, record, first)
    assert len(first.asked) == 1
    second.scale = 2
    with pytest.raises(UserError, match="its score 'light' had other settings"):
        all_scored(folder, record, both)


def test_of_a_batch_those_pictures_are_judged_that_lack_a_score(folder, tmp_path):
    record, first, second = tmp_path / "x.jsonl", Brightness(), Brightness()
    second.name = "light"
    rows = [{"file_name": name, "text": TEXTS[name]} for name in GRAYS]
    listed(folder, rows[1:2])
    scored(folder, record, first)
    listed(folder, rows)
    found = all_scored(folder, record, [RewardScore(first), RewardScore(second)])
    assert sum(shape[0] for shape in first.asked) == sum(shape[0] for shape in second.asked) == 4
    assert found.scores["brightness/overall"] == found.scores["light/overall"]
    assert found.scores["light/overall"].mean == pytest.approx((0 + 0.2 + 0.4 + 1) / 4)


def test_values_belong_to_a_picture_its_prompt_and_its_metadata(folder, tmp_path):
    class Wanted(Brightness):
        def score(self, images, prompts):
            self.asked.append(tuple(images.shape))
            return torch.tensor([float(prompt.metadata["wanted"]) for prompt in prompts])

    def row(wanted):
        return {"file_name": "0.png", "text": "a sign", "wanted": wanted}

    listed(folder, [row(1), row(3)])
    assert scored(folder, tmp_path / "x.jsonl", Wanted()).scores["brightness/overall"].mean == 2
    listed(folder, [row(1), row(5)])
    reward = Wanted()
    assert scored(folder, tmp_path / "x.jsonl", reward).scores["brightness/overall"].mean == 3
    assert reward.asked == [(1, 3, 4, 4)]


def test_a_reward_that_changes_pictures_in_place_does_not_change_those_of_others(folder, tmp_path):
    class Darkening(Brightness):
        name = "darkening"

        def score(self, images, prompts):
            return images.mul_(0).mean((1, 2, 3))

    alone = scored(folder, tmp_path / "x.jsonl").scores
    scores = [RewardScore(Darkening()), RewardScore(Brightness())]
    found = all_scored(folder, tmp_path / "y.jsonl", scores).scores
    assert {name: found[name] for name in alone} == alone


def test_a_task_with_a_single_prompt_has_a_score(folder, tmp_path):
    listed(folder, [{"file_name": n, "text": n, "tag": "alone" if n == "0.png" else "three"} for n in GRAYS])
    found = scored(folder, tmp_path / "x.jsonl").scores
    assert found["brightness/alone"] == Interval(0.0, 0.0, 0.0)
    assert found["brightness/three"].low < found["brightness/three"].mean < found["brightness/three"].high
    assert found["brightness/overall"].high == pytest.approx(found["brightness/three"].high / 2)


def test_scores_are_means_over_pictures_and_prompts_are_what_is_resampled(folder, tmp_path):
    """As GenEval's, also where prompts have different numbers of pictures."""
    listed(folder, [{"file_name": name, "text": "a" if name != "3.png" else "b"} for name in GRAYS])
    found = scored(folder, tmp_path / "x.jsonl").scores["brightness/overall"]
    assert found.mean == pytest.approx((0 + 0.2 + 0.4 + 1) / 4)
    assert (found.low, found.high) == pytest.approx((0.2, 1.0))
    # Rows of a list of prompts are prompts, even with equal texts.
    rows = [{"file": name, "prompt": "a", "row": number // 2} for number, name in enumerate(GRAYS)]
    (folder / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    by_row = scored(folder, tmp_path / "y.jsonl")
    assert (by_row.pictures, by_row.prompts) == (4, 2)
    assert (by_row.scores["brightness/overall"].low, by_row.scores["brightness/overall"].high) == pytest.approx(
        (0.1, 0.7)
    )


def test_pictures_are_turned_as_their_cameras_say_and_deep_ones_are_refused(folder, tmp_path):
    reward, exif = Brightness(), Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (6, 4)).save(folder / "turned.jpg", exif=exif)
    listed(folder, [{"file_name": "turned.jpg", "text": "a"}])
    scored(folder, tmp_path / "x.jsonl", reward)
    assert reward.asked == [(1, 3, 6, 4)]
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(folder / "deep.png")
    listed(folder, [{"file_name": "deep.png", "text": "a"}])
    with pytest.raises(UserError, match=r"deep\.png: not a readable image: its pixels have more than 8 bits \(mode I"):
        scored(folder, tmp_path / "y.jsonl")


def test_skills_of_pictures_are_means_over_questions(asked_folder, tmp_path):
    """Those of the torchmetric, with intervals; the record keeps the parts, and one without them is continued."""
    record, answers = tmp_path / "x.jsonl", PixelAnswers()
    score = GenEval2Score(answers, "arithmetic")
    found = all_scored(asked_folder, record, [score], batch_size=2)
    dark, bright = 51 / 255, (102 / 255, 1.0)
    expected = {
        "geneval2/overall": (0.75 * dark + 5 / 6 * sum(bright)) / 3,
        "geneval2/skill/attribute": 0.5 * dark,
        "geneval2/skill/object": (dark + 2.5 * sum(bright)) / 7,
    }
    assert {name: each.mean for name, each in found.scores.items()} == pytest.approx(expected, abs=1e-6)
    assert found.scores["geneval2/skill/object"].low < expected["geneval2/skill/object"] - 0.1
    assert answers.asked == 3
    assert all_scored(asked_folder, record, [score]) == found
    assert answers.asked == 3
    first, *rows = record.read_text().splitlines()
    assert [len(json.loads(row)["parts"]["geneval2"]) for row in rows] == [2, 3, 3]
    older = [json.loads(row) for row in rows]
    del older[1]["parts"]
    record.write_text("\n".join([first, *map(json.dumps, older)]) + "\n")
    assert all_scored(asked_folder, record, [score]) == found
    assert answers.asked == 4


def test_skills_of_one_picture_per_prompt_are_those_of_the_metric(asked_folder, tmp_path):
    shots = read_folder(asked_folder)[:2]
    score = GenEval2Score(PixelAnswers())
    folder = score_folder("x", shots, [score], tmp_path / "x.jsonl", {}).scores
    images = torch.stack([torch.full((3, 4, 4), GRAYS[shot.file.name] / 255) for shot in shots])
    prompts = [shot.prompt for shot in shots]
    score.begin(prompts)
    score.update(images, prompts)
    metric = {f"geneval2/{name}": float(value) for name, value in score.compute().items()}
    assert {name: each.mean for name, each in folder.items()} == pytest.approx(metric, abs=1e-7)
    assert folder["geneval2/skill/object"] == score.intervals()["skill/object"]


def test_table_of_evaluate_has_the_skills(asked_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = {"class_path": "test_folders.PixelAnswers"}
    scores = json.dumps([{"class_path": "GenEval2Score", "init_args": {"answers": answers, "mean": "arithmetic"}}])
    main(["evaluate", "--pictures", "x=pictures", "--scores", scores, "--out", "out"])
    header, _, row = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    cells = dict(zip(*([cell.strip() for cell in line.split("|")] for line in (header, row)), strict=True))
    assert cells["geneval2/skill/attribute"] == "0.100"
    assert cells["geneval2/skill/object"] == "0.529"
    (written,) = json.loads(Path("out/scores.json").read_text())
    assert set(written["scores"]["geneval2/skill/object"]) == {"mean", "low", "high"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "metadata.jsonl: it lists no picture"),
        ("{", r"metadata\.jsonl:1: broken JSON"),
        ("[]", r"metadata\.jsonl:1: not a picture with its prompt; write "),
        ('{"file_name": "0.png"}', r"metadata\.jsonl:1: not a picture with its prompt; write "),
        ('{"file_name": "9.png", "text": "a"}', r"metadata\.jsonl:1: no such picture: '.*9\.png'"),
    ],
)
def test_malformed_lists_name_the_line(folder, line, expected):
    (folder / "metadata.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=expected):
        read_folder(folder)


def test_directory_without_a_list_and_unreadable_pictures_are_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"it has no pictures\.jsonl, as sample writes it, and no metadata\.jsonl"):
        read_folder(tmp_path)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png: not a readable image: "):
        scored(folder, tmp_path / "x.jsonl")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ([{"class_path": "RewardScor"}], "did you mean 'RewardScore'"),
        ([{"class_path": "RewardScore", "init_args": {"rewad": 1}}], "did you mean"),
        ([{"class_path": "GenEvalScore"}] * 2, "--scores: two scores are named 'geneval'; give one"),
    ],
)
def test_wrong_scores_are_explained(settings, expected):
    with pytest.raises(UserError) as refused:
        built_scores(settings)
    assert expected in str(refused.value)


def test_evaluate_scores_directories_with_scores_of_a_configuration(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores = [{"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}]
    Path("scores.yaml").write_text(yaml.safe_dump({"scores": scores, "batch_size": 2}))
    arguments = ["--pictures", f"mine={folder}", "--pictures", "theirs=pictures", "--config", "scores.yaml"]
    main(["evaluate", *arguments, "--out", "out"])
    printed = capsys.readouterr().out
    assert [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("| ")][2:] == [
        "mine",
        "theirs",
    ]
    one, other = json.loads(Path("out/scores.json").read_text())
    assert (one["pictures"], one["prompts"]) == (4, 2)
    assert one["scores"] == other["scores"]
    first, *rows = map(json.loads, Path("out/mine.jsonl").read_text().splitlines())
    assert first["settings"]["brightness"]["reward"]["class"] == "Brightness"
    assert {row["prompt"] for row in rows} == {"dark", "bright"}
    assert all(set(row["scores"]) == {"brightness"} for row in rows)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--pictures", "x"], "--pictures: 'x' is not NAME=PATH"),
        (["--pictures", "a/b=x"], "--pictures: 'a/b=x' is not NAME=PATH"),
        (["--pictures", "a=x", "--pictures", "a=y"], "--pictures: a name is given twice"),
        (["--pictures", "a=x", "--checkpoint", "a=y"], "--pictures: a name is given twice"),
        (["--scores", '[{"class_path": "GenEvalScore"}]'], "--scores: there is nothing to score; give --pictures, "),
        (["--steps", "3"], "--steps: only with --pipeline; "),
        (["--checkpoint", "a=x", "--seed", "3"], "--seed: only with --pipeline, or with --checkpoint and --scores; "),
        (["--pictures", "a=x", "--per_prompt", "3"], "--per_prompt: only with --pipeline, or with --checkpoint and"),
        (["--pictures", "a=x", "--count", "3"], "--count: only with --pipeline or --checkpoint; "),
        (["--pipeline", "a=x", "--teacher", "y"], "--teacher: only with --checkpoint; "),
        (["--checkpoint", "a=x", "--batch_size", "3"], "--batch_size: only with --scores, --pictures or --pipeline; "),
        (["--pipeline", "a=x", "--teacher_steps", "3"], "--teacher_steps: only for Shapes' teacher, without --scores"),
        (
            ["--pictures", "a=x", "--pipeline_arguments.x", "1"],
            "--pipeline_arguments: only with --pipeline; leave it out",
        ),
        (["--pictures", "a=nowhere"], "nowhere: it has no pictures.jsonl"),
        (["--pipeline", "..=x"], "--pipeline: '..=x' is not NAME=PATH; give a name, then the path"),
        (["--pipeline", ".=x"], "--pipeline: '.=x' is not NAME=PATH; give a name, then the path"),
        (["--pictures", "a=x", "--batch_size", "0"], "--batch_size: it is 0"),
    ],
)
def test_evaluate_refuses_what_it_cannot_score(complaint, arguments, expected):
    assert complaint("evaluate", *arguments).startswith(expected)


def test_evaluate_draws_a_pipeline_once_and_scores_it(tiny_pipeline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    scores = '[{"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}]'
    size = ["--steps", "2", "--height", "32", "--width", "32", "--per_prompt", "2"]
    arguments = [
        "evaluate",
        "--pipeline",
        f"tiny={tiny_pipeline}",
        "--prompts",
        "prompts.txt",
        "--scores",
        scores,
        *size,
    ]
    main([*arguments, "--out", "out"])
    (row,) = json.loads(Path("out/scores.json").read_text())
    assert (row["pictures"], row["prompts"]) == (4, 2)
    drawn = {path.name: path.read_bytes() for path in Path("out/tiny").glob("*.png")}
    assert len(set(drawn.values())) == 4
    Path("out/tiny/000001-0.png").write_bytes(b"truncated")
    Path("out/tiny/000000-1.png").unlink()
    calls = []
    real = pipelines._draw
    monkeypatch.setattr(pipelines, "_draw", lambda *a: calls.append(a[2]) or real(*a))
    main([*arguments, "--out", "out"])
    assert calls == ["a red circle", "a blue square"]
    assert {path.name: path.read_bytes() for path in Path("out/tiny").glob("*.png")} == drawn
    with pytest.raises(SystemExit):
        main([*arguments, "--out", "out", "--pipeline_guidance", "2"])
    assert (
        "out/tiny: its pictures were drawn with other weights, settings or prompts; remove it"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("name", ["pictures.jsonl", "metadata.jsonl", "000000-0.png", "mine.JPG"])
def test_pictures_of_others_are_not_taken_over(tiny_pipeline, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    drawing = pipelines.Drawing(str(tiny_pipeline), 1, 1.0, 32, 32)
    with pytest.raises(UserError, match=f"it has '{name}', which was not drawn by --pipeline; use another name"):
        pipelines.draw_pictures(drawing, [Prompt("a red circle")], 1, tmp_path, "cpu")
    assert [(each.name, each.read_bytes()) for each in tmp_path.iterdir()] == [(name, b"mine")]


def test_weights_replaced_under_the_same_path_are_noticed(tiny_pipeline, tmp_path):
    pipeline, out = tmp_path / "pipeline", tmp_path / "out"
    shutil.copytree(tiny_pipeline, pipeline)
    drawing = pipelines.Drawing(str(pipeline), 1, 1.0, 32, 32)
    pipelines.draw_pictures(drawing, [Prompt("a red circle")], 1, out, "cpu")
    (pipeline / ".cache").mkdir()
    (pipeline / ".cache" / "downloaded").write_text("today")
    pipelines.draw_pictures(drawing, [Prompt("a red circle")], 1, out, "cpu")
    weights = pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    before, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="its pictures were drawn with other weights, settings or prompts"):
        pipelines.draw_pictures(drawing, [Prompt("a red circle")], 1, out, "cpu")


def test_pictures_are_those_that_the_pipeline_draws_with_these_settings(tiny_pipeline, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, text_encoder_3=None, tokenizer_3=None)
    drawing = pipelines.Drawing(str(tiny_pipeline), 3, 2.5, 32, 16, seed=4)
    pipelines.draw_pictures(drawing, [Prompt("a red circle")], 2, tmp_path / "out", "cpu")
    for number, shot in enumerate(read_folder(tmp_path / "out")):
        generator = torch.Generator().manual_seed(named_seed("drawn", 4, 0, number))
        options = {"num_inference_steps": 3, "guidance_scale": 2.5, "height": 32, "width": 16}
        expected = pipe(prompt="a red circle", generator=generator, **options).images[0]
        assert np.array_equal(np.array(Image.open(shot.file)), np.array(expected))


def test_noise_of_a_stochastic_scheduler_belongs_to_the_picture(tiny_pipeline, tmp_path):
    config = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    shutil.copytree(tiny_pipeline, tmp_path / "pipeline")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"stochastic_sampling": True}))

    def drawn(out, seed=0):
        drawing = pipelines.Drawing(str(tmp_path / "pipeline"), 3, 1.0, 32, 32, seed=seed)
        pipelines.draw_pictures(drawing, [Prompt("a red circle")], 2, tmp_path / out, "cpu")
        return [(tmp_path / out / f"000000-{number}.png").read_bytes() for number in range(2)]

    before = torch.get_rng_state()
    first = drawn("out")
    assert torch.equal(torch.get_rng_state(), before)
    (tmp_path / "out" / "000000-1.png").unlink()  # goes on with the second picture alone
    torch.rand(1)
    assert drawn("out") == first
    assert len({*first, *drawn("other", seed=1)}) == 4


BRIGHT = '[{"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}]'


def test_arguments_of_the_pipelines_call_reach_it_and_belong_to_the_pictures(
    complaint, tiny_pipeline, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("a red circle\n")
    usual = ["evaluate", "--pipeline", f"a={tiny_pipeline}", "--prompts=prompts.txt", "--scores", BRIGHT]
    usual += ["--steps=1", "--height=32", "--width=32"]
    main([*usual, "--out=plain"])
    failed = complaint(*usual, "--out=out", '--pipeline_arguments={"max_sequence_length": 600}')
    assert failed.startswith(f"--pipeline {tiny_pipeline}: fails: ValueError: `max_sequence_length` cannot be greater")
    assert not Path("out/a").exists()  # settings that failed are not in the way of others
    main([*usual, "--out=out", '--pipeline_arguments={"max_sequence_length": 0}'])
    assert Path("out/a/000000-0.png").read_bytes() != Path("plain/a/000000-0.png").read_bytes()
    assert json.loads(Path("out/a/drawn_with.json").read_text())["arguments"] == {"max_sequence_length": 0}
    assert "out/a: its pictures were drawn with other weights, settings" in complaint(*usual, "--out=out")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        (
            "max_sequence_lenght",
            0,
            "a StableDiffusion3Pipeline is not called with it; did you mean 'max_sequence_length'?",
        ),
        ("max_sequence_length", "long", "expected int, got 'long'"),
        ("max_sequence_length", True, "expected int, got True"),
        ("prompt", "a dog", "another option decides about it; use --prompts"),
        ("height", 64, "another option decides about it; use --height"),
        ("latents", [0], "another option decides about it; use --seed"),
        ("return_dict", False, "a pipeline must return pictures; leave it out"),
        ("prompt_embeds", [0.5], "expected torch.FloatTensor | None, got [0.5]"),
        ("sigmas", [1.0, 0.5], "2 values for 3 steps; use --steps 2"),
    ],
)
def test_wrong_argument_of_the_pipelines_call_is_refused_before_anything_is_loaded(tiny_pipeline, name, value, said):
    with pytest.raises(UserError) as caught:
        pipelines.checked_arguments(str(tiny_pipeline), {name: value}, 3)
    assert str(caught.value) == f"--pipeline_arguments.{name}: {said}"


def test_lists_become_tuples_where_the_pipelines_call_has_them(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    given = {"original_size": [64, 64], "guidance_rescale": 1, "negative_prompt": None}
    expected = {"guidance_rescale": 1, "negative_prompt": None, "original_size": (64, 64)}
    assert pipelines.checked_arguments(str(tmp_path), given, 3) == expected
    with pytest.raises(UserError, match="a StableDiffusionXLPipeline is not called with it"):
        pipelines.checked_arguments(str(tmp_path), {"kwargs": 1}, 3)


def test_metadata_of_a_drawn_picture_does_not_replace_its_prompt(tiny_pipeline, tmp_path):
    drawing = pipelines.Drawing(str(tiny_pipeline), 1, 1.0, 32, 32)
    prompt = Prompt("a sign", {"text": "open", "file": "x"})
    pipelines.draw_pictures(drawing, [prompt], 1, tmp_path / "out", "cpu")
    (shot,) = read_folder(tmp_path / "out")
    assert shot.prompt == prompt


def test_pipeline_that_cannot_be_loaded_or_fails_is_one_line(complaint, tiny_pipeline, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    scores = '[{"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}]'
    usual = ["evaluate", "--prompts", tmp_path / "prompts.txt", "--scores", scores, "--out", tmp_path / "out"]
    (tmp_path / "empty").mkdir()
    assert complaint(*usual, "--pipeline", f"a={tmp_path / 'empty'}").startswith(
        f"--pipeline: '{tmp_path}/empty' cannot"
    )
    assert not (tmp_path / "out").exists()
    odd = complaint(*usual, "--pipeline", f"b={tiny_pipeline}", "--height", "33", "--width", "32")
    assert odd.startswith(f"--pipeline {tiny_pipeline}: fails: ValueError: ")


def test_evaluate_draws_checkpoints_as_sample_does_and_scores_them_with_anything(
    recorded_run, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    last = str(recorded_run / "checkpoints" / "last.ckpt")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    scores = '[{"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}]'
    drawn = ["--per_prompt=2", "--seed=5", "--trust=tiny"]
    main(["sample", last, "prompts.txt", "samples", *drawn])
    asked = ["--checkpoint", f"mine={last}", "--pictures", "same=samples", "--prompts=prompts.txt", "--scores", scores]
    main(["evaluate", *asked, *drawn, "--out=out", "--batch_size=8"])
    same, mine = json.loads(Path("out/scores.json").read_text())
    assert (mine["name"], mine["pictures"], mine["prompts"]) == ("mine", 4, 2)
    assert mine["scores"] == same["scores"]
    names = {path.name: path.read_bytes() for path in Path("samples").glob("*.png")}
    assert {path.name: path.read_bytes() for path in Path("out/mine").glob("*.png")} == names
    Path("out/mine/000001-1.png").unlink()
    main(["evaluate", *asked, *drawn, "--out=out", "--batch_size=8"])
    assert {path.name: path.stat().st_size > 0 for path in Path("out/mine").glob("*.png")} == dict.fromkeys(names, True)
    with pytest.raises(SystemExit):
        main(["evaluate", *asked, "--seed=6", "--trust=tiny", "--out=out"])
    assert "made with seed '5', not '6'; give another directory" in capsys.readouterr().err


def test_evaluate_scores_what_sample_has_written(recorded_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    last = str(recorded_run / "checkpoints" / "last.ckpt")
    main(["sample", last, "shapes", "samples", "--count=2", "--per_prompt=2", "--split=test", "--trust=tiny"])
    main(["evaluate", "--pictures", "ours=samples", "--out", "out"])
    (row,) = json.loads(Path("out/scores.json").read_text())
    assert (row["pictures"], row["prompts"]) == (4, 2)
    assert {"geneval/overall", "shapes/overall", "hps_like/overall"} <= row["scores"].keys()
    assert torch.isfinite(torch.tensor(row["scores"]["shapes/overall"]["mean"]))
    capsys.readouterr()
