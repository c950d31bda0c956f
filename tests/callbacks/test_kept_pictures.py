"""Pictures of evaluations are kept with every score, and an interrupted evaluation goes on from them."""

import json

import pytest
import tiny
import torch
from PIL import Image

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.kept_pictures import KeptPictures
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.metrics.evaluation import fixed_noise
from gdmd_lightning.metrics.intervals import Value
from gdmd_lightning.metrics.scores import RewardScore
from gdmd_lightning.pictures import to_bytes
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.roles import Optimization
from gdmd_lightning.samplers import Renoise
from gdmd_lightning.streams import streams_of
from gdmd_lightning.studies.folders import read_folder


class Counting(tiny.Brightness):
    """Brightness that counts what it scores and is killed after a number of pictures."""

    def __init__(self):
        self._asked, self._limit = [], None

    def killed_after(self, limit):
        """The limit is no argument: those are settings, with which other pictures would be kept."""
        self._limit = limit
        return self

    @property
    def asked(self):
        return self._asked

    def score(self, images, prompts):
        if self._limit is not None and len(self._asked) + len(images) > self._limit:
            raise KeyboardInterrupt
        self._asked += [prompt.text for prompt in prompts]
        return super().score(images, prompts)


def module_of(pipeline, **options):
    torch.manual_seed(0)
    return tiny.module(pipeline, ReFL, reward=tiny.Brightness(), steps=2, **options)


def evaluated(pipeline, place, reward=None, updates=1, module=None, **options):
    """The module and callback of a run of cheap updates."""
    options = {"count": 6, "per_prompt": 2, "columns": 0, "teacher_steps": 2, "batch_size": 5, **options}
    tests = GenerationEvaluation([RewardScore(reward or Counting())], **options)
    module = module or module_of(pipeline)
    trainer = tiny.train(module, updates, callbacks=[tests], default_root_dir=place)
    return module, tests, trainer


def noting(generate, texts):
    """Lets a generator note the texts that it draws."""
    return lambda *given, **options: texts.extend(given[2]) or generate(*given, **options)


def rows_in(place):
    return [json.loads(line) for line in (place / "pictures.jsonl").read_text().splitlines()]


def test_every_picture_is_kept_with_its_prompt_seed_and_scores(tiny_pipeline, tmp_path):
    module, tests, trainer = evaluated(tiny_pipeline, tmp_path, seed=3)
    directories = sorted((tmp_path / "evaluations" / "shapes").iterdir())
    assert [place.name for place in directories] == ["000001", "teacher"]
    ours, teacher = map(rows_in, directories)
    assert [row["file"] for row in ours] == [f"{row:06d}-{number}.png" for row in range(6) for number in range(2)]
    assert [row["prompt"] for row in ours] == [prompt.text for prompt in tests.prompts]
    assert {row["seed"] for row in ours} == {3}
    mean = sum(row["scores"]["brightness"] for row in ours) / len(ours)
    assert trainer.logged_metrics["eval/brightness/overall"].item() == pytest.approx(mean, abs=1e-7)
    of_teacher = sum(row["scores"]["brightness"] for row in teacher) / len(teacher)
    assert tests.teacher["brightness/overall"] == pytest.approx(of_teacher, abs=1e-7)
    shots = read_folder(directories[0])  # as evaluate --pictures reads it
    assert [shot.prompt for shot in shots] == tests.prompts
    noise = fixed_noise(7, module.latent_shape, 3)[None]
    expected = to_bytes(module.generate(noise, [tests.prompts[7].text], rngs=streams_of(noise)))[0]
    with Image.open(directories[0] / "000003-1.png") as picture:
        drawn = torch.tensor(list(picture.get_flattened_data())).view(expected.shape)
    assert (drawn - expected.int()).abs().max() <= 1  # batches of another size are rounded otherwise


def test_an_interrupted_evaluation_judges_and_draws_no_picture_twice(tiny_pipeline, tmp_path, monkeypatch):
    _, tests, whole = evaluated(tiny_pipeline, tmp_path / "whole")
    for limit, left in ((10, 2 + 12), (17, 12 - 5)):
        place, killed = tmp_path / str(limit), Counting().killed_after(limit)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            evaluated(tiny_pipeline, place, killed)
        reward, drawn = Counting(), []
        with monkeypatch.context() as patched:
            for name in ("generate", "generate_teacher"):
                patched.setattr(ReFL, name, noting(getattr(ReFL, name), drawn))
            _, again, trainer = evaluated(tiny_pipeline, place, reward)
        assert len(reward.asked) == len(drawn) == left, limit
        assert again.teacher == tests.teacher
        assert trainer.logged_metrics["eval/brightness/overall"] == whole.logged_metrics["eval/brightness/overall"]
        for name in ("teacher", "000001"):
            here, there = (rows_in(root / "evaluations" / "shapes" / name) for root in (place, tmp_path / "whole"))
            assert here == there
            assert not list((place / "evaluations" / "shapes" / name).glob("pictures-*"))


def test_pictures_of_other_weights_are_not_taken(tiny_pipeline, tmp_path):
    evaluated(tiny_pipeline, tmp_path)
    before = rows_in(tmp_path / "evaluations" / "shapes" / "000001")
    same, other = Counting(), Counting()
    evaluated(tiny_pipeline, tmp_path, same)
    assert same.asked == []
    changed = module_of(tiny_pipeline, generator=Optimization(0.05, warmup=0))
    evaluated(tiny_pipeline, tmp_path, other, module=changed)
    assert len(other.asked) == 12  # the teacher is the same
    after = rows_in(tmp_path / "evaluations" / "shapes" / "000001")
    assert len(after) == 12
    assert all(x["scores"] != y["scores"] for x, y in zip(before, after, strict=True))


def test_pictures_of_another_sampler_or_other_settings_are_not_taken(tiny_pipeline, tmp_path):
    still, sampled, seeded = Optimization(1e-30, warmup=0), Counting(), Counting()  # the weights do not change
    evaluated(tiny_pipeline, tmp_path, module=module_of(tiny_pipeline, generator=still))
    other = module_of(tiny_pipeline, generator=still, sampler=Renoise())
    evaluated(tiny_pipeline, tmp_path, sampled, module=other)
    assert len(sampled.asked) == 12  # the teacher is the same
    evaluated(tiny_pipeline, tmp_path, seeded, seed=1, keep_pictures="latest")
    assert len(seeded.asked) == 24


def test_latest_keeps_the_pictures_of_one_evaluation_and_the_lists_of_all(tiny_pipeline, tmp_path):
    evaluated(tiny_pipeline, tmp_path, updates=3, every_n_updates=1, keep_pictures="latest", per_prompt=1)
    counts = {
        place.name: (len(list(place.glob("*.png"))), len(rows_in(place)))
        for place in (tmp_path / "evaluations" / "shapes").iterdir()
    }
    assert counts == {"teacher": (6, 6), "000001": (0, 6), "000002": (0, 6), "000003": (6, 6)}
    evaluated(tiny_pipeline, tmp_path / "none", keep_pictures="none")
    assert not (tmp_path / "none" / "evaluations").exists()


def test_a_picture_of_a_stochastic_sampler_does_not_depend_on_its_batch(tiny_pipeline, tmp_path):
    found = []
    for size in (1, 6):
        module = module_of(tiny_pipeline, sampler=Renoise())
        evaluated(tiny_pipeline, tmp_path / str(size), module=module, batch_size=size, score_teacher=False)
        found.append(
            [row["scores"]["brightness"] for row in rows_in(tmp_path / str(size) / "evaluations/shapes/000001")]
        )
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert len({round(value, 4) for value in found[0]}) > 6


def test_two_evaluations_of_the_same_prompts_have_directories_of_their_own(tiny_pipeline, tmp_path):
    class Other(Counting):
        name = "other"

    options = {"count": 6, "columns": 2, "teacher_steps": 2}
    both = [GenerationEvaluation([RewardScore(reward)], **options) for reward in (Counting(), Other())]
    tiny.train(module_of(tiny_pipeline), 1, callbacks=both, default_root_dir=tmp_path)
    assert {place.name for place in (tmp_path / "evaluations").iterdir()} == {"shapes", "shapes-2"}
    assert (tmp_path / "pictures" / "000001.png").is_file()
    assert (tmp_path / "pictures" / "shapes-2" / "000001.png").is_file()


def test_lists_of_ranks_become_one_and_what_is_not_whole_is_made_again(tmp_path):
    prompts = [Prompt("a\u2028b", {"tag": "x"}), Prompt("c"), Prompt("d")]
    ranks = [KeptPictures(tmp_path, "key", 1, 0, rank) for rank in (0, 1)]
    images = torch.rand(3, 3, 4, 4)

    def keep(kept, index, key="s"):
        value = Value(index / 3, (0.5,) * index)
        kept.keep([index], images[index : index + 1], prompts[index : index + 1], {key: [value]})

    keep(ranks[1], 1)
    with (tmp_path / "pictures-1.jsonl").open("a") as file:
        file.write('{"file": "000002-0.png", "sco')  # killed
    keep(ranks[0], 0)
    assert ranks[0].known(prompts) == {0: {"s": Value(0.0)}, 1: {"s": Value(1 / 3, (0.5,))}}
    assert KeptPictures(tmp_path, "another", 1, 0).known(prompts) == {}
    keep(ranks[1], 2)
    ranks[0].finish()
    assert [row["prompt"] for row in map(json.loads, (tmp_path / "pictures.jsonl").read_bytes().splitlines())] == [
        prompt.text for prompt in prompts
    ]
    assert [path.name for path in sorted(tmp_path.glob("*.jsonl"))] == ["pictures.jsonl"]
    assert [shot.prompt for shot in read_folder(tmp_path)] == prompts
    (tmp_path / "000001-0.png").unlink()
    assert set(ranks[1].known(prompts)) == {0, 2}
