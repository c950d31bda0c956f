"""Hacking and collapse are noticed while a run trains; it warns, stops with all saved, or rolls back to the bit."""

import itertools
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from gdmd_lightning.callbacks import progress
from gdmd_lightning.callbacks.collapse_rules import Fall, Rise
from gdmd_lightning.callbacks.collapse_watch import CollapseWatch, RollBack
from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.roll_back import best_checkpoint
from gdmd_lightning.callbacks.variety import GenerationVariety
from gdmd_lightning.configuration import training
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import WholeCheckpoints, read_checkpoint
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.metrics.scores import RewardScore
from gdmd_lightning.roles import Optimization
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy


class Darkness(tiny.Brightness):
    """What a run that is trained on brightness does not see, and loses."""

    name = "darkness"

    def score(self, images, prompts) -> Tensor:
        return 10 - super().score(images, prompts)


class Scripted(pl.Callback):
    """Logs figures that are written down, by the number of updates that were trained, whatever their numbers."""

    def __init__(self, **figures: list[float]) -> None:
        self.figures, self.count = figures, 0

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        values = {name: each[min(self.count, len(each) - 1)] for name, each in self.figures.items()}
        pl_module.log_dict(values, batch_size=1)
        self.count += 1

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict) -> None:
        self.count = state_dict["count"]


class After(pl.Callback):
    """Keeps the state after each update, the next learning rates, and how many batches of prompts were used."""

    def __init__(self) -> None:
        self.states, self.updates, self.rates, self.seeds, self.batches = [], [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, *_) -> None:
        whole = trainer._checkpoint_connector.dump_checkpoint()
        trained = {name: whole[name] for name in ("state_dict", "optimizer_states", "global_step", "loops")}
        self.states.append(torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, trained))
        self.updates.append(pl_module.updates)
        self.rates.append([group["lr"] for each in trainer.optimizers for group in each.param_groups])
        self.seeds.append(pl_module.seed)
        self.batches.append(trainer.datamodule.batches_consumed)


def train(pipeline, updates, callbacks, *, place=None, ckpt_path=None, **options):
    """Train ReFL; returns the module, the trainer and the warnings about collapse."""
    module = tiny.module(pipeline, ReFL, **{"reward": tiny.Brightness(), "steps": 2, **options})
    trainer = tiny.trainer(
        updates,
        callbacks=callbacks,
        default_root_dir=place,
        enable_checkpointing=place is not None,
        log_every_n_steps=1,
        enable_progress_bar=any(isinstance(callback, progress.Progress) for callback in callbacks),
    )
    trainer.strategy.checkpoint_io = WholeCheckpoints()
    data = training.PromptDataModule("shapes", batch_size=4, group_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return module, trainer, [str(each.message) for each in caught if "collapsing" in str(each.message)]


def test_a_hacked_reward_is_noticed_by_the_held_out_one(tiny_pipeline, tmp_path):
    scores = GenerationEvaluation(
        [RewardScore(tiny.Brightness()), RewardScore(Darkness())], count=6, columns=0, every_n_updates=2
    )
    variety = GenerationVariety(count=6, samples=2, every_n_updates=2)
    watch = CollapseWatch(
        falls=(
            Fall("variety/diversity", by=0.99),
            Fall("eval/brightness/overall", by=0.05),
            Fall("eval/darkness/overall", by=0.05),
        ),
        rises=(Rise("train/grad_norm/generator", factor=1000, window=1), Rise("variety/latent_std", 100, window=1)),
        every_n_updates=2,
    )
    trained_on = {"generator": Optimization(learning_rate=3e-2), "ema_decay": 0.0, "steps": 4}
    _, trainer, (once,) = train(tiny_pipeline, 12, [scores, variety, watch], place=tmp_path, **trained_on)
    assert once.startswith("The run may be collapsing: first moved eval/darkness/overall at update ")
    logged = trainer.callback_metrics
    assert logged["eval/darkness/overall"] < 0.9 * 5 < logged["eval/brightness/overall"]
    assert 0 < logged["variety/diversity"] < 1


def test_a_healthy_run_is_never_interrupted_nor_changed(tiny_pipeline, tmp_path):
    script = Scripted(held_out=[0.5, 0.45, 0.55, 0.47], spread=[1.0, 1.2, 0.9, 1.3])
    falls, rises = (Fall("held_out", by=0.2, patience=1),), (Rise("spread", factor=1.5, window=1, patience=1),)
    watch = CollapseWatch(falls, rises, every_n_updates=1, policy="stop")
    watched, trainer, said = train(tiny_pipeline, 4, [script, watch], place=tmp_path)
    alone, _, _ = train(tiny_pipeline, 4, [])
    assert said == []
    assert trainer.global_step == 4
    assert tiny.differing(watched.state_dict(), alone.state_dict()) == []


def test_stop_saves_the_run_and_then_fails(tiny_pipeline, tmp_path):
    script = Scripted(held_out=[1, 1, 0.5, 0.4], other=[1, 0.9, 0.8, 0.1])
    watch = CollapseWatch((Fall("other", by=0.5), Fall("held_out", by=0.2)), every_n_updates=1, policy="stop")
    keeper = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
    expected = (
        r"^CollapseWatch: stopped after 4 updates: first moved held_out at update 3, from 1 to 0\.5; "
        r"resume from an earlier checkpoint with other settings; the last state is in .*collapsed\.ckpt$"
    )
    with pytest.raises(UserError, match=expected):
        train(tiny_pipeline, 9, [script, watch, keeper], place=tmp_path)
    for path in (tmp_path / "checkpoints" / "collapsed.ckpt", tmp_path / "last.ckpt"):
        assert read_checkpoint(str(path))["global_step"] == 4


def rolling(place, held_out, patience=2, **options):
    """Callbacks of a run that is rolled back, and its watch."""
    keeper = ModelCheckpoint(place, "{step}", monitor="held_out", mode="max", every_n_train_steps=1, save_last=True)
    after, script = After(), Scripted(held_out=held_out)
    falls = (Fall("held_out", by=0.2, patience=patience),)
    watch = CollapseWatch(falls, every_n_updates=1, policy="roll_back", **options)
    return [script, watch, after, keeper], watch, after


@pytest.fixture(scope="module")
def rolled(tiny_pipeline, tmp_path_factory):
    """A run that is best after update 2, collapses in updates 3 and 4, goes back and ends well after update 5."""
    place = tmp_path_factory.mktemp("rolled")
    callbacks, watch, after = rolling(place, [0.5, 1, 0.1, 0.1, 0.9, 0.95, 0.9])
    settings = {"generator": Optimization(learning_rate=1e-3, warmup=4), "seed": 5}
    return *train(tiny_pipeline, 5, callbacks, place=place, **settings), watch, after, place, settings


def test_roll_back_restores_the_best_checkpoint_to_the_bit_and_goes_on(rolled):
    module, trainer, (said,), watch, after, place, _ = rolled
    assert said == (
        "The run was collapsing: first moved held_out at update 3, from 1 to 0.1. It goes on from update 2 instead of "
        "4, with learning rates times 0.5 (roll-back 1 of 2)."
    )
    assert after.updates == [1, 2, 3, 2, 3, 4, 5]
    assert (trainer.global_step, module.updates, watch.rolled_back) == (5, 5, 1)
    at_best, again = after.states[1], after.states[3]
    rates = [group.pop("lr") for each in again["optimizer_states"] for group in each["param_groups"]]
    former = [group.pop("lr") for each in at_best["optimizer_states"] for group in each["param_groups"]]
    first = [group.pop("initial_lr") for each in again["optimizer_states"] for group in each["param_groups"]]
    _ = [group.pop("initial_lr") for each in at_best["optimizer_states"] for group in each["param_groups"]]
    assert tiny.differing(at_best, again) == []
    assert rates == [rate / 2 for rate in former]
    assert first == [0.5e-3]
    assert read_checkpoint(str(place / "last.ckpt"))["global_step"] == 5


def test_roll_back_takes_another_course(rolled):
    _, _, _, _, after, _, _ = rolled
    assert after.rates[-1] == [pytest.approx(0.5e-3)]
    assert len(set(after.seeds)) == 2
    assert tiny.differing(after.states[2]["state_dict"], after.states[4]["state_dict"]) != []


def test_a_run_resumed_after_its_roll_back_equals_the_uninterrupted_one(rolled, tiny_pipeline, tmp_path):
    module, _, _, _, after, _, settings = rolled
    callbacks, watch, again = rolling(tmp_path, [0.5, 1, 0.1, 0.1, 0.9, 0.95, 0.9])
    half = tmp_path / "half"
    stopped, _, _ = rolling(half, [0.5, 1, 0.1, 0.1, 0.9, 0.95, 0.9])
    train(tiny_pipeline, 9, [*stopped[:2], Ended(5), *stopped[2:]], place=half, **settings)
    resumed, _, said = train(tiny_pipeline, 5, callbacks, place=tmp_path, ckpt_path=str(half / "last.ckpt"), **settings)
    assert said == []
    assert watch.rolled_back == 1
    assert again.updates == [4, 5]
    assert again.rates == after.rates[-2:]
    assert tiny.differing(again.states[-1], after.states[-1]) == []
    assert tiny.differing(resumed.state_dict(), module.state_dict()) == []


class Ended(pl.Callback):
    """Ends a run after a number of updates, those that were rolled back included."""

    def __init__(self, count: int) -> None:
        self.left = count

    def on_train_batch_end(self, trainer, *_) -> None:
        self.left -= 1
        trainer.should_stop = self.left == 0


def test_after_a_roll_back_an_alarm_takes_its_patience_again(tiny_pipeline, tmp_path):
    callbacks, watch, after = rolling(tmp_path, [1, 0.1, 0.1, 0.1, 0.9])
    train(tiny_pipeline, 3, callbacks, place=tmp_path)
    assert after.updates == [1, 2, 1, 2, 3]
    assert watch.rolled_back == 1


def test_roll_back_scales_a_falling_learning_rate_too(tiny_pipeline, tmp_path):
    callbacks, _, after = rolling(tmp_path, [0.5, 1, 0.1, 0.1, 0.9])
    falling = Optimization(learning_rate=1e-3, warmup=0, schedule="linear")
    train(tiny_pipeline, 4, callbacks, place=tmp_path, generator=falling)
    assert after.updates == [1, 2, 3, 2, 3, 4]
    # Callbacks see the rate of the next update.
    factors = [0.75, 0.5, 0.25, 0.25, 0.125, 0]
    assert [rate for (rate,) in after.rates] == pytest.approx([1e-3 * factor for factor in factors])


def test_checkpoint_of_an_update_that_was_rolled_back_to_is_written_again(tiny_pipeline, tmp_path):
    callbacks, watch, _ = rolling(tmp_path, [1, 0.1], 1)
    train(tiny_pipeline, 9, [*callbacks[:2], Ended(2), *callbacks[2:]], place=tmp_path)
    last = read_checkpoint(str(tmp_path / "last.ckpt"))
    assert last["global_step"] == 1
    assert last["callbacks"][watch.state_key]["rolled_back"] == 1


def test_roll_backs_are_limited(tiny_pipeline, tmp_path):
    twice = RollBack(limit=2, learning_rate_factor=1.0)
    callbacks, watch, after = rolling(tmp_path, [1, 0.1, 0.1, 0.1], 1, roll_back=twice)
    with pytest.raises(UserError, match=r"from 1 to 0\.1; it was rolled back 2 times before; "):
        train(tiny_pipeline, 9, callbacks, place=tmp_path)
    assert after.updates == [1, 1, 1, 2]
    assert after.batches == [1, 2, 3, 4]
    assert watch.rolled_back == 2


def test_roll_back_refuses_a_best_checkpoint_that_has_moved_already(tiny_pipeline, tmp_path):
    callbacks, _, _ = rolling(tmp_path, [1, 0.1, 0.1])
    callbacks[-1].mode, callbacks[-1].kth_value = "min", torch.tensor(torch.inf)
    with pytest.raises(UserError, match="the best checkpoint is of update 2, not before that; "):
        train(tiny_pipeline, 9, callbacks, place=tmp_path)


class Removed(pl.Callback):
    """Removes all checkpoints before update 2 is watched."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def on_train_batch_end(self, trainer, *_) -> None:
        if trainer.global_step == 2:
            for path in self.place.glob("*.ckpt"):
                path.unlink()


def test_a_run_whose_best_checkpoint_is_gone_keeps_its_last_state(tiny_pipeline, tmp_path):
    callbacks, _, _ = rolling(tmp_path / "best", [1, 0.1], 1)
    with pytest.raises(UserError, match=r"from 1 to 0\.1; the best checkpoint cannot be read: .*step=1\.ckpt"):
        train(tiny_pipeline, 9, [Removed(tmp_path / "best"), *callbacks], place=tmp_path)
    (kept,) = tmp_path.rglob("collapsed.ckpt")
    assert read_checkpoint(str(kept))["global_step"] == 2


def test_time_of_an_update_counts_those_that_were_rolled_back(tiny_pipeline, tmp_path, capsys, monkeypatch):
    seconds = itertools.count(100, 10)  # every look at the clock is 10 s later
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    callbacks, _, _ = rolling(tmp_path, [1, 0.1, 0.9], 1)
    train(tiny_pipeline, 2, [*callbacks[:3], progress.Progress(1e-6), callbacks[3]], place=tmp_path)
    shown = capsys.readouterr().out
    assert re.findall(r"update (\d)/2 .* (\S+) s/update", shown) == [("1", "10"), ("1", "10"), ("2", "10")]
    assert "\n3 updates in 0:40, 2 in all\n" in shown


def refused(pipeline, place, *callbacks):
    with pytest.raises(UserError) as caught:
        train(pipeline, 2, list(callbacks), place=place)
    return str(caught.value)


def test_what_cannot_be_watched_is_refused(tiny_pipeline, tmp_path):
    fall = (Fall("eval/brightness/overall", by=0.2),)
    scores = GenerationEvaluation([RewardScore(tiny.Brightness())], count=6, columns=0, every_n_updates=4)
    watch = CollapseWatch(fall, every_n_updates=2)
    for callbacks in ([watch], [watch, scores]):
        line = refused(tiny_pipeline, tmp_path, *callbacks)
        assert line.startswith("CollapseWatch: eval/brightness/overall: no GenerationEvaluation before CollapseWatch")
    assert "logged every 4 updates and observed every 2; " in refused(tiny_pipeline, tmp_path, scores, watch)
    back = CollapseWatch((Fall("loss", by=0.2),), policy="roll_back")
    assert "no ModelCheckpoint keeps the best whole" in refused(tiny_pipeline, tmp_path, back)
    for options in ({"save_top_k": 0}, {"save_weights_only": True}):
        keeper = ModelCheckpoint(tmp_path, monitor="loss", every_n_train_steps=1, **options)
        assert "no ModelCheckpoint keeps the best whole" in refused(tiny_pipeline, tmp_path, back, keeper)
    unknown = CollapseWatch((Fall("train/los", by=0.2),), every_n_updates=1)
    line = refused(tiny_pipeline, tmp_path, unknown)
    assert line.startswith("CollapseWatch: no figure 'train/los' has been logged by update 1; there are ")
    assert "'train/grad_norm/generator'" in line
    for rules, expected in (((), "no figure is watched"), (fall * 2, "a rule is given twice")):
        with pytest.raises(UserError, match=expected):
            CollapseWatch(rules)


def test_best_checkpoint_is_that_of_the_first_keeper_by_a_figure_that_has_saved(tmp_path):
    keepers = [ModelCheckpoint(tmp_path), *(ModelCheckpoint(tmp_path, monitor="loss") for _ in range(3))]
    trainer = SimpleNamespace(checkpoint_callbacks=keepers)
    keepers[0].best_model_path = "latest.ckpt"
    assert best_checkpoint(trainer) is None
    keepers[2].best_model_path, keepers[3].best_model_path = "best.ckpt", "other.ckpt"
    assert best_checkpoint(trainer) == Path("best.ckpt")


@pytest.mark.parametrize("kind", [MultiEngineDeepSpeedStrategy, FSDP2Strategy])
def test_strategy_that_cannot_load_while_it_trains_is_refused(tiny_pipeline, tmp_path, kind):
    keeper = ModelCheckpoint(tmp_path, monitor="loss", every_n_train_steps=1)
    watch = CollapseWatch((Fall("loss", by=0.2),), policy="roll_back")
    trainer = SimpleNamespace(callbacks=[watch], checkpoint_callbacks=[keeper], strategy=object.__new__(kind))
    with pytest.raises(UserError, match=f"{kind.__name__} cannot load a checkpoint while it trains; use policy stop"):
        watch.setup(trainer, tiny.module(tiny_pipeline), "fit")


def test_watches_of_two_intervals_keep_their_states_apart(tiny_pipeline, tmp_path):
    watches = [CollapseWatch((Fall("held_out", by=0.2),), every_n_updates=n) for n in (1, 2)]
    _, trainer, _ = train(tiny_pipeline, 3, [Scripted(held_out=[1, 2, 3]), *watches], place=tmp_path)
    states = trainer._checkpoint_connector.dump_checkpoint()["callbacks"]
    healthy = [state["rules"] for key, state in states.items() if key.startswith("CollapseWatch")]
    assert [next(iter(rules.values()))["healthy"] for rules in healthy] == [[3.0], [2.0]]
    assert replace(watches[0].tracks[0]).healthy == [3.0]


HELD_OUT, OTHER = Fall("held_out", by=0.2), Fall("other", by=0.2)


def loaded(states, *watches):
    """What each watch of a run has seen after its checkpoint with these states is loaded, by figure."""
    trainer = SimpleNamespace(callbacks=list(watches))
    for watch in watches:
        watch.on_load_checkpoint(trainer, None, {"callbacks": states})
    return [{track.rule.figure: track.healthy for track in watch.tracks if track.healthy} for watch in watches]


def seen(watch, *values):
    for value in values:
        for track in watch.tracks:
            track.observe(1, value)
    watch.rolled_back = 1
    return watch.state_dict()


def test_watches_of_one_interval_keep_their_states_apart(tiny_pipeline, tmp_path):
    watches = [CollapseWatch((rule,), every_n_updates=1) for rule in (HELD_OUT, OTHER)]
    watches.append(CollapseWatch((OTHER,), every_n_updates=1, policy="stop"))
    script = Scripted(held_out=[1, 2], other=[3, 4])
    train(tiny_pipeline, 2, [script, *watches, ModelCheckpoint(tmp_path, "2", every_n_train_steps=2)], place=tmp_path)
    again = [CollapseWatch((HELD_OUT,), every_n_updates=1), CollapseWatch((OTHER,), every_n_updates=1)]
    train(tiny_pipeline, 3, [script, *again], place=tmp_path, ckpt_path=tmp_path / "2.ckpt")
    assert [watch.tracks[0].healthy for watch in again] == [[2.0], [4.0]]


def test_a_watch_with_another_policy_or_other_rules_finds_its_state():
    before = CollapseWatch((HELD_OUT,), every_n_updates=2)
    state = seen(before, 1, 2)
    for key in (before.state_key, "CollapseWatch{'every_n_updates': 2}"):  # the latter: of an earlier version
        watch = CollapseWatch((HELD_OUT, OTHER), every_n_updates=2, policy="roll_back")
        assert loaded({key: state}, watch) == [{"held_out": [2.0]}]
        assert watch.rolled_back == 1
        new = CollapseWatch((OTHER,), every_n_updates=2)
        assert loaded({key: state}, new) == [{}]
        assert new.rolled_back == 1  # the course of the run is kept
        for n in (1, 20):
            assert loaded({key: state}, CollapseWatch((HELD_OUT,), every_n_updates=n)) == [{}]


def test_a_watch_takes_no_state_of_another_one():
    before = CollapseWatch((HELD_OUT,), every_n_updates=2)
    states = {before.state_key: seen(before, 1, 2)}
    same, new = CollapseWatch((HELD_OUT,), every_n_updates=2), CollapseWatch((OTHER, HELD_OUT), every_n_updates=2)
    assert loaded(states, same, new) == [{}, {}]  # Lightning gives the first one its state after this
    changed, new = CollapseWatch((HELD_OUT,), (), 2, "stop"), CollapseWatch((OTHER,), every_n_updates=2)
    assert loaded(states, changed, new) == [{"held_out": [2.0]}, {}]
    assert (changed.rolled_back, new.rolled_back) == (1, 0)


def test_two_equal_watches_are_refused(fast_fit, monkeypatch):
    watch = '{"class_path": "CollapseWatch", "init_args": {"falls": [{"figure": "loss", "by": 0.2}]}}'
    with pytest.raises(UserError, match=r"^trainer\.callbacks: two CollapseWatch are the same, so .*; remove one, or "):
        training.run([*fast_fit, f"--trainer.callbacks=[{watch}, {watch}]"])


def test_a_configuration_can_watch(fast_fit, monkeypatch):
    monkeypatch.setattr(training.DistillationCLI, "_run_subcommand", lambda self, name: None)
    settings = {"falls": '[{"figure":"loss","by":0.2}]', "rises": '[{"figure":"loss","factor":2}]'}
    options = [f"--trainer.callbacks.{key}={value}" for key, value in settings.items()]
    cli = training.run([*fast_fit, "--trainer.callbacks+=CollapseWatch", *options])
    (watch,) = [each for each in cli.trainer.callbacks if isinstance(each, CollapseWatch)]
    assert [track.rule for track in watch.tracks] == [Fall("loss", by=0.2), Rise("loss", factor=2)]
