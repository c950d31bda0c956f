"""Evaluation at checkpoints: scores by task, images next to the teacher's, and no effect on the training."""

from dataclasses import replace
from functools import partial

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from matplotlib.image import imread

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.provenance import read_provenance
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.metrics.evaluation import evaluate
from gdmd_lightning.metrics.scores import GenEvalScore, RewardScore
from gdmd_lightning.rewards.shapes import ShapesReward
from gdmd_lightning.shapes.captions import TASKS


@pytest.fixture(scope="module")
def events(recorded_run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(recorded_run)).Reload()


def test_overall_score_is_the_mean_of_the_logged_tasks(events):
    tags = events.Tags()["scalars"]
    tasks = [events.Scalars(f"eval/geneval/{task}")[-1] for task in TASKS]
    overall = events.Scalars("eval/geneval/overall")[-1]
    assert overall.value == pytest.approx(sum(task.value for task in tasks) / len(TASKS))
    assert "eval/seconds_per_picture" in tags


def test_evaluation_draws_teacher_and_generator_in_tensorboard_and_a_file(events, recorded_run):
    assert events.Images("teacher and generator")[-1].step == 6
    (png,) = (recorded_run / "pictures").iterdir()
    assert png.name == "000006.png"
    picture = imread(png)
    assert picture.std() > 0.05, "blank"


def quick(pipeline) -> DistillationModule:
    """A method whose updates are cheap; an evaluation is the same for all."""
    return tiny.module(pipeline, ReFL, reward=tiny.Brightness(), steps=2)


def evaluation(**options) -> GenerationEvaluation:
    options = {"count": 6, "columns": 0, "score_teacher": False, **options}
    return GenerationEvaluation([RewardScore(tiny.Brightness())], **options)


def test_evaluation_does_not_change_the_run(tiny_pipeline, tmp_path):
    torch.manual_seed(0)
    alone = quick(tiny_pipeline)
    tiny.train(alone, 2)
    torch.manual_seed(1)
    watched = quick(tiny_pipeline)
    tiny.train(watched, 2, callbacks=[evaluation(every_n_updates=1)], default_root_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters(), strict=True))


def test_evaluation_scores_the_averaged_weights(tiny_pipeline, tmp_path):
    module, tests = quick(tiny_pipeline), evaluation(every_n_updates=3)
    trainer = tiny.train(module, 3, callbacks=[tests], default_root_dir=tmp_path)
    logged = trainer.logged_metrics["eval/brightness/overall"].item()
    found = {}
    for role in ("ema", "generator"):
        generate = partial(module.generate, role=role)
        evaluate(generate, tests.prompts, tests.scores, module.latent_shape)
        found[role] = tests.scores[0].compute()["overall"].item()
    assert logged == found["ema"] != found["generator"]


def test_evaluation_runs_when_due_and_at_the_end(tiny_pipeline, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(GenerationEvaluation, "run", lambda self, trainer, module: done.append(module.updates))
    tiny.train(quick(tiny_pipeline), 5, callbacks=[evaluation(every_n_updates=2)], default_root_dir=tmp_path)
    assert done == [2, 4, 5]


class Listening(DummyLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.scalars: list[tuple[int, str, float]] = []

    def log_metrics(self, metrics, step=None):
        self.scalars += [(step, name, float(value)) for name, value in metrics.items()]


def test_every_score_is_logged_once_at_its_update_in_every_logger(tiny_pipeline, tmp_path):
    loggers = [Listening(), Listening()]
    options = {"logger": loggers, "log_every_n_steps": 2, "default_root_dir": tmp_path}
    trainer = tiny.train(quick(tiny_pipeline), 5, callbacks=[evaluation(every_n_updates=3)], **options)
    for logger in loggers:
        steps = {}
        for step, name, _ in logger.scalars:
            steps.setdefault(name, []).append(step)
        assert steps["eval/brightness/overall"] == [3, 5]
        assert steps["eval/seconds_per_picture"] == [3, 5]
        assert steps["loss"] == [2, 4]
        assert not {"step", "epoch"} & set(steps)
    last = [value for step, name, value in loggers[0].scalars if (step, name) == (5, "eval/brightness/overall")]
    assert last == [trainer.callback_metrics["eval/brightness/overall"].item()]


def test_teacher_is_scored_once_and_logged_with_every_evaluation(tiny_pipeline, tmp_path, monkeypatch):
    logger, teacher = Listening(), {"teacher_steps": 3, "teacher_guidance": 2.0}
    tests = evaluation(every_n_updates=1, score_teacher=True, **teacher)
    module = quick(tiny_pipeline)
    tiny.train(module, 2, callbacks=[tests], logger=logger, default_root_dir=tmp_path)
    generate = partial(module.generate_teacher, steps=3, guidance_scale=2.0)
    evaluate(generate, tests.prompts, tests.scores, module.latent_shape)
    expected = tests.scores[0].compute()["overall"].item()
    assert expected != module.provenance.scores["brightness/overall"]
    logged = [(step, value) for step, name, value in logger.scalars if name == "teacher/brightness/overall"]
    assert logged == [(1, expected), (2, expected)]

    again = evaluation(every_n_updates=1, score_teacher=True, **teacher)
    assert again.state_key == tests.state_key
    again.load_state_dict(tests.state_dict())
    monkeypatch.setattr(type(module), "generate_teacher", None)  # nothing asks it a second time
    tiny.train(module, 3, callbacks=[again], default_root_dir=tmp_path)
    assert again.teacher == tests.teacher


@pytest.mark.parametrize(
    "changed", [{"count": 12}, {"seed": 1}, {"teacher_steps": 4}, {"teacher_guidance": 1.5}, {"every_n_updates": 7}]
)
def test_evaluations_with_other_settings_do_not_share_a_teachers_scores(changed):
    assert evaluation(**changed).state_key != evaluation().state_key


def test_more_prompts_are_not_more_pictures_of_each_prompt():
    assert evaluation(count=12).state_key != evaluation(count=6, per_prompt=2).state_key


class Prepared(tiny.Brightness):
    """Keeps what is done with it, in order."""

    def __init__(self, done):
        self.done = done

    def prepare(self):
        self.done.append("prepared")

    def to(self, device):
        self.done.append(device)

    def score(self, images, prompts):
        self.done.append("scored")
        return super().score(images, prompts)


def test_networks_of_scores_are_loaded_before_training_and_leave_the_device_after_each_evaluation(
    tiny_pipeline, tmp_path, monkeypatch
):
    done = []
    tests = GenerationEvaluation([RewardScore(Prepared(done))], count=6, columns=0, score_teacher=False)
    module = quick(tiny_pipeline)
    update = type(module).update
    monkeypatch.setattr(type(module), "update", lambda *a: done.append("update") or update(*a))
    tiny.train(module, 1, callbacks=[tests], default_root_dir=tmp_path)
    cpu = torch.device("cpu")
    assert done == ["prepared", "update", cpu, "scored", cpu]


def test_several_pictures_of_a_prompt_have_different_noise(tiny_pipeline, tmp_path):
    tests = evaluation(per_prompt=3)
    texts = [prompt.text for prompt in tests.prompts]
    assert len(texts) == 18
    assert texts[:3] == [texts[0]] * 3
    trainer = tiny.train(quick(tiny_pipeline), 1, callbacks=[tests], default_root_dir=tmp_path)
    assert trainer.logged_metrics["eval/brightness/overall"].isfinite()
    assert tests.state_key != evaluation().state_key


def test_trainer_validate_evaluates_a_checkpoint_once(tiny_pipeline, tmp_path):
    tests = evaluation(every_n_updates=2, score_teacher=True, teacher_steps=2)
    saved = tiny.SaveAfter(2, tmp_path / "two.ckpt")
    trained = tiny.train(quick(tiny_pipeline), 2, callbacks=[tests, saved], default_root_dir=tmp_path / "fit")
    module, again = quick(tiny_pipeline), evaluation(every_n_updates=2, score_teacher=True, teacher_steps=2)
    validating = tiny.trainer(1, callbacks=[again], default_root_dir=tmp_path / "validate", logger=False)
    (found,) = validating.validate(module, datamodule=PromptDataModule("shapes"), ckpt_path=tmp_path / "two.ckpt")
    for name in ("eval/brightness/overall", "teacher/brightness/overall"):
        assert found[name] == pytest.approx(float(trained.logged_metrics[name]), rel=1e-6)
    assert (tmp_path / "validate" / "evaluations" / "shapes" / "000002" / "pictures.jsonl").is_file()
    # And a run that trains does not validate.
    steps = []
    module.validation_step = lambda *given: steps.append(given)
    tiny.train(module, 1, default_root_dir=tmp_path)
    assert not steps


class StopAfter(pl.Callback):
    def __init__(self, updates: int) -> None:
        self.updates = updates

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        trainer.should_stop = pl_module.updates == self.updates


def test_a_resumed_run_that_is_stopped_early_does_not_evaluate(tiny_pipeline, tmp_path):
    """Lightning validates where a run is stopped, and asks for the batches of that."""
    saved = tiny.SaveAfter(1, tmp_path / "one.ckpt")
    tiny.train(quick(tiny_pipeline), 1, callbacks=[evaluation(every_n_updates=9), saved], default_root_dir=tmp_path)
    done = []
    tests = evaluation(every_n_updates=9)
    tests.run = lambda trainer, module: done.append(module.updates)
    resumed = tiny.trainer(6, callbacks=[tests, StopAfter(3)], default_root_dir=tmp_path)
    data = PromptDataModule("shapes", batch_size=8, group_size=4)
    resumed.fit(quick(tiny_pipeline), datamodule=data, ckpt_path=tmp_path / "one.ckpt")
    assert resumed.global_step == 3
    assert done == []


@pytest.mark.parametrize("size", [32, 16])
def test_the_teacher_is_scored_again_for_pictures_of_another_size(tiny_pipeline, tmp_path, size):
    options = {"every_n_updates": 1, "score_teacher": True, "teacher_steps": 2, "keep_pictures": "none"}
    saved = tiny.SaveAfter(1, tmp_path / "one.ckpt")
    first = evaluation(**options)
    tiny.train(quick(tiny_pipeline), 1, callbacks=[first, saved], default_root_dir=tmp_path)
    module = ReFL(tiny.family(tiny_pipeline), tiny.Brightness(), steps=2, height=size, width=size)
    again = evaluation(**options)
    data = PromptDataModule("shapes", batch_size=8, group_size=4)
    resumed = tiny.trainer(2, callbacks=[again], default_root_dir=tmp_path)
    resumed.fit(module, datamodule=data, ckpt_path=tmp_path / "one.ckpt")
    assert (again.teacher == first.teacher) is (size == 32)


def test_evaluation_of_a_prompt_file_has_one_score(tiny_pipeline, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\ntwo squares\n")
    tests = GenerationEvaluation([RewardScore(tiny.Brightness())], prompts=str(prompts), columns=2, teacher_steps=2)
    trainer = tiny.train(quick(tiny_pipeline), 1, callbacks=[tests], default_root_dir=tmp_path)
    scores = [name for name in trainer.logged_metrics if name.startswith("eval/brightness")]
    assert scores == ["eval/brightness/overall"]
    assert (tmp_path / "pictures" / "000001.png").is_file()


class Rehearsed(tiny.Brightness):
    """Gives the generators that it scores these values, one after the other; each has one batch of pictures."""

    name = "rehearsed"

    def __init__(self, *values):
        self.values = list(values)

    def score(self, images, prompts):
        return torch.full((len(images),), self.values.pop(0))


def keeping(place, score, **options):
    return ModelCheckpoint(place, monitor=f"eval/{score}/overall", mode="max", **options)


def test_a_monitored_task_that_no_score_has_is_refused_before_training(tiny_pipeline, tmp_path):
    keeper = ModelCheckpoint(tmp_path, monitor="eval/brightness/overal", mode="max", every_n_train_steps=1)
    tests = evaluation(every_n_updates=1)
    assert tests.scores[0].figures(tests.prompts) == ["overall", *TASKS]
    with pytest.raises(
        UserError, match=r"^ModelCheckpoint\.monitor: nothing computes 'eval/brightness/overal'; use eval"
    ):
        tiny.train(quick(tiny_pipeline), 1, callbacks=[tests, keeper], enable_checkpointing=True)


@pytest.mark.parametrize(("interval", "best"), [(2, 4), (4, 4), (6, 6)])
def test_monitored_score_keeps_the_best_checkpoint_and_not_the_last(tiny_pipeline, tmp_path, interval, best):
    keeper = keeping(tmp_path / "best", "rehearsed", every_n_train_steps=interval)
    score = RewardScore(Rehearsed(1.0, 3.0, 2.0, 0.0))
    tests = GenerationEvaluation([score], count=6, columns=0, score_teacher=False, every_n_updates=2)
    options = {"callbacks": [keeper, tests], "default_root_dir": tmp_path, "enable_checkpointing": True}
    tiny.train(quick(tiny_pipeline), 8, **options)
    (kept,) = (tmp_path / "best").iterdir()
    found = read_provenance(read_checkpoint(str(kept), in_memory=False))
    assert (found.updates, found.scores["rehearsed/overall"]) == (best, {4: 3.0, 6: 2.0}[best])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "has no every_n_train_steps"),
        ({"every_n_epochs": 1}, "has no every_n_train_steps"),
        ({"every_n_train_steps": 3}, "saves every 3 updates"),
        ({"every_n_train_steps": 1}, "saves every 1 updates"),
    ],
)
@pytest.mark.parametrize("kind", ["eval", "teacher"])
def test_keeper_of_the_best_that_does_not_save_at_evaluations_is_refused_before_any_score_loads(
    tiny_pipeline, tmp_path, options, said, kind
):
    keeper = ModelCheckpoint(tmp_path, monitor=f"{kind}/other/overall", **options)
    first = GenerationEvaluation([RewardScore(Prepared(done := []))], count=6, columns=0)
    second = GenerationEvaluation([RewardScore(Named())], count=6, columns=0, every_n_updates=2)
    callbacks = {"callbacks": [first, second, keeper], "default_root_dir": tmp_path, "enable_checkpointing": True}
    with pytest.raises(UserError) as refused:
        tiny.train(quick(tiny_pipeline), 2, **callbacks)
    assert str(refused.value) == (
        f"ModelCheckpoint.monitor: it {said}, and '{kind}/other/overall' is computed every 2; "
        "set its every_n_train_steps to 2 or a multiple of it"
    )
    assert done == []


def test_keeper_of_other_figures_may_save_at_any_update(tiny_pipeline, tmp_path):
    keepers = [ModelCheckpoint(tmp_path), ModelCheckpoint(tmp_path, monitor="train/loss", every_n_train_steps=1)]
    tests = evaluation(every_n_updates=2)
    options = {"callbacks": [tests, *keepers], "default_root_dir": tmp_path, "enable_checkpointing": True}
    tests.setup(tiny.trainer(2, **options), quick(tiny_pipeline), "fit")


def test_prompts_that_a_score_cannot_judge_are_refused_at_the_start(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n")
    with pytest.raises(UserError, match=r"^score 'geneval': prompt 'a red circle' has no GenEval metadata; "):
        GenerationEvaluation([GenEvalScore()], prompts=str(path), count=1)


class Named(tiny.Brightness):
    """Brightness with a factor, under another name."""

    def __init__(self, name="other", factor=1.0):
        self.name, self.factor = name, factor

    def score(self, images, prompts):
        return self.factor * super().score(images, prompts)


def test_two_evaluations_keep_each_others_scores(tiny_pipeline, tmp_path):
    often = evaluation(every_n_updates=1)
    seldom = GenerationEvaluation([RewardScore(Named())], count=12, columns=0, score_teacher=False, every_n_updates=2)
    module, kept = quick(tiny_pipeline), []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            kept.append(dict(module.provenance.scores))

    callbacks = [often, seldom, Watch()]
    tiny.train(module, 3, callbacks=callbacks, default_root_dir=tmp_path)
    assert [set(each) for each in kept] == [
        {"brightness/overall", *(f"brightness/{task}" for task in TASKS)},
        *[{f"{name}/{task}" for name in ("brightness", "other") for task in ("overall", *TASKS)}] * 2,
    ]
    assert len({each["brightness/overall"] for each in kept}) == 3
    assert len({each.get("other/overall") for each in kept}) == 3


def test_scores_of_an_evaluation_that_is_gone_are_not_kept(tiny_pipeline, tmp_path):
    module = quick(tiny_pipeline)
    module.provenance = replace(module.provenance, scores={"gone/overall": 1.0, "brightness/gone": 1.0})
    tiny.train(module, 1, callbacks=[evaluation()], default_root_dir=tmp_path)
    assert set(module.provenance.scores) == {f"brightness/{task}" for task in ("overall", *TASKS)}


def test_two_evaluations_with_a_score_of_one_name_are_refused_before_training(tiny_pipeline, tmp_path):
    with pytest.raises(UserError, match=r"^GenerationEvaluation\.scores: two scores are named 'brightness'; "):
        tiny.train(quick(tiny_pipeline), 1, callbacks=[evaluation(), evaluation(count=12)], default_root_dir=tmp_path)


def test_two_scores_of_one_name_in_one_evaluation_are_refused():
    scores = [RewardScore(tiny.Brightness()), GenEvalScore(), RewardScore(tiny.Brightness())]
    with pytest.raises(UserError, match=r"^GenerationEvaluation\.scores: two scores are named 'brightness'; give one"):
        GenerationEvaluation(scores, count=6)


def test_scores_with_a_name_of_their_own_are_reported_side_by_side(tiny_pipeline, tmp_path):
    scores = [GenEvalScore(), GenEvalScore(name="again"), RewardScore(ShapesReward()), RewardScore(ShapesReward("too"))]
    tests = GenerationEvaluation(scores, count=6, columns=0, score_teacher=False)
    found = tiny.train(quick(tiny_pipeline), 1, callbacks=[tests], default_root_dir=tmp_path).logged_metrics
    for one, other in (("geneval", "again"), ("shapes", "too")):
        assert found[f"eval/{one}/overall"] == found[f"eval/{other}/overall"]


def test_a_reward_with_other_settings_does_not_share_a_teachers_scores():
    keys = [
        GenerationEvaluation([RewardScore(reward)], count=6).state_key
        for reward in (Named(), Named(), Named(factor=2.0), Named("x"), tiny.Brightness())
    ]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4


def test_state_key_does_not_change_while_a_reward_scores():
    reward = Named()
    tests = GenerationEvaluation([RewardScore(reward)], count=6)
    before = tests.state_key
    reward.factor, reward.seen = 2.0, 7
    assert tests.state_key == before
