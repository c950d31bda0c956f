"""Scores: means of task means for any batch size, with intervals that cover; evaluation with fixed noise."""

import copy
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torchmetrics.utilities import dim_zero_cat

from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.geneval.rules import Detection, Rules
from gdmd_lightning.metrics.evaluation import Pace, evaluate, fixed_noise, shown
from gdmd_lightning.metrics.intervals import Interval, exact_mean
from gdmd_lightning.metrics.scores import STATES, GenEvalScore, RewardScore, TaskScore
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.shapes.captions import TASKS, evaluation_prompts
from gdmd_lightning.shapes.detector import ShapesDetector
from gdmd_lightning.shapes.scenes import render, sample_scenes


class Brightness(Reward):
    name = "brightness"

    def score(self, images, prompts):
        return images.mean((1, 2, 3))


def with_task(task):
    return Prompt("text", {"tag": task})


def filled(values, tasks):
    score = RewardScore(Brightness())
    prompts = [with_task(t) for t in tasks]
    score.begin(prompts)
    score.update(torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 3, 2, 2), prompts)
    return score


def test_score_overall_is_the_mean_of_task_means():
    result = filled([1.0, 0.0, 0.0, 0.0, 1.0], ["a", "b", "b", "b", "b"]).compute()
    assert result["a"] == 1
    assert result["b"] == 0.25
    assert result["overall"] == pytest.approx(0.625)


def test_rank_without_prompts_has_values_to_gather_too():
    score = RewardScore(Brightness())
    score.begin([with_task("a")])
    assert [part.shape for state in STATES for part in getattr(score, state)] == [(0,)] * len(STATES)
    assert score.compute()["overall"].isnan()


def test_score_of_prompts_without_task_is_overall_only():
    assert set(filled([0.2, 0.4], ["all", "all"]).compute()) == {"overall"}


def test_score_does_not_depend_on_batches():
    values, tasks = torch.rand(10).tolist(), ["a", "b"] * 5
    whole = filled(values, tasks).compute()
    parts = RewardScore(Brightness())
    parts.begin([with_task(t) for t in tasks])
    for i in range(0, 10, 3):
        images = torch.tensor(values[i : i + 3]).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
        parts.update(images, [with_task(t) for t in tasks[i : i + 3]])
    assert parts.compute()["overall"] == pytest.approx(whole["overall"])


def test_interval_covers_the_mean_at_its_stated_rate():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(60):
        values = (rng.random(80) < 0.7).astype(float)
        interval = filled(values.tolist(), ["a"] * 40 + ["b"] * 40).intervals()["overall"]
        covered += interval.low <= 0.7 <= interval.high
    assert 50 <= covered <= 60


class Parted(RewardScore):
    """Brightness, whose parts are the first pixels, by the names that a prompt gives."""

    def __init__(self):
        super().__init__(Brightness())

    def part_names(self, prompt):
        return prompt.metadata.get("parts", [])

    def judge_parts(self, images, prompts):
        parts = [i.flatten()[: len(self.part_names(p))] for i, p in zip(images, prompts, strict=True)]
        return self.judge(images, prompts), parts


def test_parts_of_values_are_averaged_by_name_over_all_pictures():
    prompts = [Prompt("p", {"parts": each}) for each in (["x", "y", "x"], [], ["x"])]
    images = torch.zeros(3, 3, 2, 2)
    images.view(3, -1)[0, :3] = torch.tensor([0.5, 0.25, 1.0])
    images.view(3, -1)[2, :1] = 0.75
    score = Parted()
    score.begin(prompts)
    score.update(images[:2], prompts[:2])
    score.update(images[2:], prompts[2:])
    found = score.compute()
    assert list(found) == ["overall", "x", "y"]
    assert (found["x"], found["y"]) == ((0.5 + 1 + 0.75) / 3, 0.25)
    intervals = score.intervals()
    assert intervals["y"] == Interval(0.25, 0.25, 0.25)
    assert intervals["x"] == Interval(0.75, 0.75, 0.75)
    images[2] = 0.0
    score.begin(prompts)
    score.update(images, prompts)
    # Both pictures with an x are drawn together or one of them twice; the empty one never.
    assert score.intervals()["x"] == Interval(0.5, 0.0, 0.75)


def test_interval_of_equal_values_is_a_point():
    assert filled([0.5, 0.5], ["a", "b"]).intervals()["overall"] == Interval(0.5, 0.5, 0.5)


def test_values_that_are_added_are_those_of_an_update():
    prompts = [Prompt("p", {"tag": tag, "parts": parts}) for tag, parts in (("a", ["x", "y"]), ("b", []), ("a", ["x"]))]
    images = torch.rand(3, 3, 2, 2)
    updated, added = Parted(), Parted()
    for score in (updated, added):
        score.begin(prompts)
    updated.update(images, prompts)
    added.update(added.values_of(images[:1], prompts[:1]), prompts[:1])
    assert len(added.values_of(images, prompts)) == 3  # which adds nothing
    added.update(updated.values_of(images[1:], prompts[1:]), prompts[1:])
    assert added.compute() == updated.compute()
    assert added.intervals() == updated.intervals()


def test_a_reward_that_changes_pictures_in_place_does_not_change_those_of_other_scores():
    class Darkening(Brightness):
        name = "darkening"

        def score(self, images, prompts):
            return images.mul_(0).mean((1, 2, 3))

    images, prompts = torch.rand(4, 3, 2, 2), [Prompt(f"p{i}") for i in range(4)]
    scores = [RewardScore(Darkening()), RewardScore(Brightness())]
    evaluate(lambda noise, texts: images, prompts, scores, (1, 2, 2))
    assert scores[1].compute()["overall"].item() == pytest.approx(images.mean().item(), abs=1e-6)
    assert images.mean() > 0


def test_geneval_score_of_true_pictures_is_one_in_every_task():
    prompts = evaluation_prompts(10)
    pictures = render(sample_scenes([p.metadata for p in prompts], np.random.default_rng(0)))
    score = GenEvalScore()
    score.begin(prompts)
    score.update(pictures, prompts)
    assert {name: float(v) for name, v in score.compute().items()} == dict.fromkeys(("overall", *TASKS), 1.0)


class FindsRedCircle(Detector):
    rules = Rules(score_threshold=0.5)

    def __init__(self, confidence: float = 0.6):
        self.confidence = confidence

    def detect(self, images, prompts):
        return [[Detection("circle", (0, 0, 9, 9), self.confidence, "red")] for _ in images]


@pytest.mark.parametrize(("confidence", "expected"), [(0.6, 1.0), (0.4, 0.0)])
def test_geneval_score_uses_its_detector_and_that_detectors_rules(confidence, expected):
    content = {"tag": "colors", "include": [{"class": "circle", "count": 1, "color": "red"}]}
    prompts = [Prompt("a red circle", content)] * 2
    score = GenEvalScore(FindsRedCircle(confidence))
    score.begin(prompts)
    score.update(torch.zeros(2, 3, 8, 8), prompts)
    assert score.compute()["colors"] == expected


def parsed(scores: str):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--score", type=TaskScore)
    return parser.instantiate_classes(parser.parse_args(["--score", scores])).score


def test_geneval_score_needs_no_detector_in_a_configuration():
    assert isinstance(parsed('{"class_path": "GenEvalScore"}').detector, ShapesDetector)


def test_geneval_score_and_its_reward_have_the_name_that_is_given():
    score = GenEvalScore(name="strict")
    assert score.name == score.reward.name == "strict"
    assert GenEvalScore().name == "geneval"


def test_geneval_score_takes_a_detector_from_a_configuration():
    detector = '{"class_path": "test_scores.FindsRedCircle", "init_args": {"confidence": 0.7}}'
    score = parsed(f'{{"class_path": "GenEvalScore", "init_args": {{"detector": {detector}}}}}')
    assert score.detector.confidence == 0.7


def test_evaluation_noise_depends_on_the_prompt_only():
    seen = {}

    def generate(noise, texts):
        for row, text in zip(noise, texts, strict=True):
            seen.setdefault(text, []).append(row)
        return noise.mean((1, 2, 3), keepdim=True).expand(-1, 3, 2, 2)

    prompts = [Prompt(str(i)) for i in range(7)]
    results = []
    for size, world in ((7, 1), (2, 1), (3, 2)):
        scores: list[TaskScore] = [RewardScore(Brightness())]
        for rank in range(world):
            seconds = evaluate(generate, prompts, scores, (1, 2, 2), batch_size=size, rank=rank, world_size=world)
            assert seconds > 0
        results.append(scores)
    for index, rows in enumerate(seen[str(i)] for i in range(7)):
        assert len(rows) == 3
        for row in rows:
            assert torch.equal(row, fixed_noise(index, (1, 2, 2), 0))


def test_rank_without_prompts_left_takes_part_in_the_rounds_of_the_others():
    class OfTwoMore(Pace):
        done = 0

        def rounds(self, batches):
            return batches + 2

        def after(self):
            self.done += 1

    asked, pace, score = [], OfTwoMore(), RewardScore(Brightness())

    def generate(noise, texts):
        asked.append(texts)
        return torch.zeros(len(noise), 3, 2, 2)

    evaluate(generate, [Prompt(str(i)) for i in range(3)], [score], (1, 2, 2), batch_size=2, pace=pace)
    assert asked == [["0", "1"], ["2"]]
    assert dim_zero_cat(score.values).tolist() == [0.0] * 3
    assert pace.done == 4


def test_shown_pictures_cover_every_task():
    prompts = evaluation_prompts(100)
    texts, noise = shown(prompts, 9, (1, 2, 2), 0)
    by_text = {p.text: p.metadata["tag"] for p in prompts}
    assert {by_text[text] for text in texts} == set(TASKS)
    assert len(noise) == 9


def test_a_rank_without_prompts_gathers_as_many_tensors_as_the_others():
    """Otherwise an evaluation with fewer prompts than ranks would wait forever, or stop with an error."""
    prompts = [with_task("a")]
    busy, idle = RewardScore(Brightness()), RewardScore(Brightness())
    for score in (busy, idle):
        score.begin(prompts)
    busy.update(torch.full((1, 3, 2, 2), 0.25), prompts)
    sent: dict[str, list[torch.Tensor]] = {}
    for name, score in (("busy", busy), ("idle", idle)):
        sent[name] = []

        def note(tensor, group, to=name):
            sent[to].append(tensor)
            return [tensor]

        score.sync(dist_sync_fn=note, distributed_available=lambda: True)
        score.unsync()
    assert [len(tensor) for tensor in sent["busy"]] == [1, 1, 0, 0, 1]
    assert [len(tensor) for tensor in sent["idle"]] == [0] * len(STATES)
    assert [t.dtype for t in sent["idle"]] == [t.dtype for t in sent["busy"]]
    others = iter(sent["busy"])
    idle.sync(dist_sync_fn=lambda tensor, group: [tensor, next(others)], distributed_available=lambda: True)
    assert float(dim_zero_cat(idle.values)) == 0.25
    assert dim_zero_cat(idle.tasks).tolist() == [0]


def test_scores_refuse_prompts_that_they_cannot_judge_before_any_picture():
    bare = [Prompt("a red circle")]
    for score, where in ((GenEvalScore(), "score 'geneval'"), (RewardScore(ShapesReward()), "reward 'shapes'")):
        for ask in (score.check, score.begin):
            with pytest.raises(UserError, match=f"^{where}: prompt 'a red circle' has no GenEval metadata; "):
                ask(bare)
    RewardScore(Brightness()).check(bare)


@pytest.mark.parametrize("clause", [{"class": "mauve"}, {"class": "circle", "color": "mauve"}])
def test_geneval_score_refuses_names_that_its_detector_does_not_know(clause):
    with pytest.raises(UserError, match=r"^score 'geneval': .*'mauve'"):
        GenEvalScore().check([Prompt("text", {"include": [{"count": 1, **clause}]})])


def test_geneval_score_prepares_and_places_its_detector():
    class Noted(FindsRedCircle):
        ready, device = False, None

        def prepare(self):
            self.ready = True

        def to(self, device):
            self.device = device

    detector, cpu = Noted(), torch.device("cpu")
    score = GenEvalScore(detector)
    score.prepare()
    score.place(cpu)
    assert (detector.ready, detector.device) == (True, cpu)


def test_score_refuses_an_empty_test_set():
    with pytest.raises(UserError, match=r"^score 'brightness': there are no prompts$"):
        RewardScore(Brightness()).begin([])


def test_geneval_score_is_strict():
    class Half(Detector):
        def detect(self, images, prompts):
            return [[Detection("circle", (0, 0, 9, 9), 0.95)] for _ in images]

    two = [{"class": "circle", "count": 1}, {"class": "square", "count": 1}]
    score, prompts = GenEvalScore(Half()), [Prompt("a circle and a square", {"tag": "two_object", "include": two})]
    score.begin(prompts)
    score.update(torch.zeros(1, 3, 8, 8), prompts)
    assert score.compute()["overall"] == 0


def test_mean_is_exact_in_any_order():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(1000).remainder(9)
    exact = sum(map(Fraction, values.tolist())) / 1000
    for seed in range(3):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        mean = exact_mean(values[order])
        assert (mean.dtype, mean.item()) == (torch.float64, float(exact))


TASKS_OF_SEVEN = ["a", "b", "b", "a", "b", "a", "b"]


def score_seven(rank: int = 0, world_size: int = 1, batch_size: int = 7) -> dict[str, str]:
    """Scores of seven prompts by name, to the bit."""

    def generate(noise, texts):
        return (noise.mean((1, 2, 3), keepdim=True).abs() / 3).expand(-1, 3, 2, 2)

    named = [["x"] * (i % 3) + ["y"] for i in range(7)]
    prompts = [Prompt(str(i), {"tag": tag, "parts": named[i]}) for i, tag in enumerate(TASKS_OF_SEVEN)]
    score = Parted()
    evaluate(generate, prompts, [score], (1, 2, 2), batch_size=batch_size, rank=rank, world_size=world_size)
    found = {name: value.item() for name, value in score.compute().items()}
    return {name: value.hex() for name, value in found.items()}


def score_on_a_rank(rank: int, directory: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    (directory / f"{rank}.json").write_text(json.dumps(score_seven(rank, 2, batch_size=3)))
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_scores_of_one_to_the_bit(tmp_path):
    torch.multiprocessing.start_processes(score_on_a_rank, (tmp_path,), nprocs=2, start_method="fork")
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one == other == score_seven() == score_seven(batch_size=2)
    assert set(one) == {"overall", "a", "b", "x", "y"}


def test_settings_of_a_score_are_those_of_its_reward(tmp_path):
    def settings(**options):
        return GenEvalScore(FindsRedCircle(**options)).settings()

    assert settings() == settings() != settings(confidence=0.7)
    assert settings()["reward"]["detector"]["rules"]["score_threshold"] == 0.5
    brighter = Brightness()
    brighter.batch_size = 3
    assert RewardScore(brighter).settings() == RewardScore(Brightness()).settings()
    brighter.dtype = torch.bfloat16
    brighter._loaded = object()
    expected = {"class": "Brightness", "name": "brightness", "differentiable": False, "dtype": "torch.bfloat16"}
    assert RewardScore(brighter).settings()["reward"] == expected
    brighter.parts_of = {"x": [1, (2.0, None)], "y": torch.nn.Identity()}
    assert RewardScore(brighter).settings()["reward"]["parts_of"] == {"x": [1, [2.0, None]], "y": "Identity"}


def test_arguments_of_a_score_of_ones_own_are_settings_of_it():
    class Brighter(TaskScore):
        def __init__(self, least: float) -> None:
            super().__init__()
            self._least = least

        def judge(self, images, prompts):
            return (images.mean((1, 2, 3)) > self._least).float()

    assert Brighter(0.2).settings() == Brighter(0.2).settings() != Brighter(0.3).settings()
    assert "0.2" not in str(Brighter(0.2).settings())
    assert copy.deepcopy(Brighter(0.2)).settings() == Brighter(0.2).settings()
