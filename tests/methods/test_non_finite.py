"""Steps that are not finite stop training or are skipped, and no checkpoint of them is written or read."""

from dataclasses import replace
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from world import module_of, three_prompts

from gdmd_lightning.configuration.noise import quiet
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.engines.lightning import LightningEngine
from gdmd_lightning.engines.non_finite import Attempt, NonFinite, StepGuard
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.finite import check_finite
from gdmd_lightning.methods.provenance import Provenance
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.roles import Optimization

NAN, INF = float("nan"), float("inf")
SKIP = NonFinite(policy="skip", limit=2)


def attempt(loss: float = 1.0, norm: float = 1.0, role: str = "generator", update: int = 7) -> Attempt:
    return Attempt(role, update, ("a", "a", "b", "c"), torch.tensor(loss), torch.tensor(norm))


# The guard.


@pytest.mark.parametrize(("loss", "norm"), [(NAN, 1.0), (INF, 1.0), (1.0, NAN), (1.0, -INF), (NAN, NAN)])
def test_guard_stops_at_a_loss_or_gradient_that_is_not_finite(loss, norm):
    guard = StepGuard(NonFinite())
    assert guard.allows(attempt())
    with pytest.raises(UserError) as stop:
        guard.allows(attempt(loss, norm))
    expected = (
        f"role 'generator': loss {loss:g} and gradient norm {norm:g} in update 7, with prompts 'a', 'b' and 1 more; "
    )
    assert str(stop.value).startswith(expected)
    assert str(stop.value).endswith("or set model.non_finite.policy to skip")


def test_error_names_all_prompts_of_a_step_with_two_or_fewer():
    for texts, expected in ((("a", "b", "a"), "'a', 'b'; no"), (("a",), "'a'; no")):
        assert f"with prompts {expected} checkpoint" in str(replace(attempt(NAN), prompts=texts).error(0))


def test_guard_skips_until_the_limit_of_consecutive_steps_of_a_role():
    guard = StepGuard(SKIP)
    assert [guard.allows(attempt(loss)) for loss in (NAN, NAN, 1.0, NAN, NAN)] == [False, False, True, False, False]
    assert not guard.allows(attempt(NAN, role="fake_score"))
    with pytest.raises(UserError, match="in update 7, after 2 skipped steps in a row, with prompts"):
        guard.allows(attempt(NAN))
    assert not guard.allows(attempt(NAN)), "a new run starts counting again"


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_guard_decides_for_all_ranks(policy):
    guard = StepGuard(NonFinite(policy, limit=1), lambda finite: False)  # another rank's loss is not finite
    if policy == "skip":
        assert not guard.allows(attempt())
    with pytest.raises(UserError, match=r"\(it is finite on this rank\)"):
        guard.allows(attempt())


def test_guard_judges_steps_on_an_accelerator_later_and_names_the_first_wrong_one(monkeypatch):
    monkeypatch.setattr(Attempt, "waits", True)
    guard = StepGuard(NonFinite())
    for each in (attempt(), attempt(NAN, update=8), attempt(NAN, update=9)):
        assert guard.allows(each)
    with pytest.raises(UserError, match="in update 8,"):
        guard.settle()
    guard.settle()  # nothing is left
    assert not StepGuard(SKIP).allows(attempt(NAN)), "whether to skip cannot be decided later"


# Training.


@pytest.fixture
def poison(monkeypatch):
    """``poison({(2, "generator")}, "loss")`` makes these steps' losses NaN, or their gradients alone."""
    backward = LightningEngine.backward

    def poison(steps: set[tuple[int, str]], what: str = "loss") -> None:
        def poisoned(self, loss):
            if (self.update, self.roles.learner) in steps:
                zero = sum((p * 0).sum() for p in self.roles.parameters_of(self.roles.learner))
                loss = loss * NAN if what == "loss" else loss + zero.sqrt()  # the root's gradient is infinite
            backward(self, loss)

        monkeypatch.setattr(LightningEngine, "backward", poisoned)

    return poison


class After(Callback):
    """State after every update: weights, each optimizer's number of steps, skipped steps as logged."""

    def __init__(self) -> None:
        self.weights, self.steps, self.skipped = [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.weights.append({k: v.clone() for k, v in module.roles.state_dict().items()})
        self.steps.append(
            [sum(int(s["step"]) for s in o.state.values()) / max(len(o.state), 1) for o in trainer.optimizers]
        )
        self.skipped.append(trainer.callback_metrics.get("train/skipped_steps"))


def module_with(policy: NonFinite = NonFinite(), **options):
    return module_of(non_finite=policy, matching=Matching(fake_score_updates=1), **options)


def fit(module, updates: int, place: Path, *callbacks: Callback) -> tuple[After, pl.Trainer]:
    after = After()
    trainer = tiny.trainer(updates, callbacks=[after, *callbacks], enable_checkpointing=bool(callbacks))
    trainer.fit(module, datamodule=three_prompts(place))
    return after, trainer


def keeper(place: Path) -> ModelCheckpoint:
    """Saves every update as ``last.ckpt``."""
    return ModelCheckpoint(place, every_n_train_steps=1, save_last=True, save_top_k=0)


def same(one, other, *roles: str) -> bool:
    return all(torch.equal(one[k], other[k]) for k in one if k.split(".")[0] in roles)


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("role", ["generator", "fake_score"])
def test_training_stops_before_a_step_that_is_not_finite(poison, tmp_path, what, role):
    poison({(2, role)}, what)
    module = module_with()
    expected = (
        rf"role '{role}': loss \S+ and gradient norm nan in update 2, with prompts '0.5 -1.0', '-1.5 0.25' and 1 more"
    )
    with pytest.raises(UserError, match=expected) as stop:
        fit(module, 4, tmp_path)
    assert ("loss nan" in str(stop.value)) == (what == "loss")
    assert all(v.isfinite().all() for v in module.roles.state_dict().values())
    assert module.updates == 1


@pytest.mark.parametrize("later", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("update", [3, 4], ids=["inside", "at the end"])
def test_last_checkpoint_is_that_of_the_last_finite_update(poison, monkeypatch, tmp_path, later, update):
    poison({(update, "fake_score")})
    monkeypatch.setattr(Attempt, "waits", later)
    with pytest.raises(UserError, match=f"role 'fake_score': loss nan and gradient norm nan in update {update},"):
        fit(module_with(), 4, tmp_path, keeper(tmp_path))
    content = read_checkpoint(str(tmp_path / "last.ckpt"))
    assert content["provenance"]["updates"] == update - 1
    assert all(v.isfinite().all() for v in content["state_dict"].values())


@pytest.mark.parametrize("update", [1, 2])
def test_training_without_checkpoints_stops_too_where_steps_are_judged_later(poison, monkeypatch, tmp_path, update):
    poison({(update, "generator")})
    monkeypatch.setattr(Attempt, "waits", True)
    module = module_with()
    with pytest.raises(UserError, match=f"role 'generator': loss nan and gradient norm nan in update {update},"):
        fit(module, 2, tmp_path)
    assert module.updates == update, "another update was begun"


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing_and_training_goes_on(poison, tmp_path, what):
    poison({(2, "generator")}, what)
    module = module_with(SKIP)
    after, trainer = fit(module, 3, tmp_path)
    one, two, three = after.weights
    assert same(one, two, "generator", "ema")
    assert not same(one, two, "fake_score")
    assert not same(two, three, "generator")
    assert not same(two, three, "ema")
    assert after.steps == [[1, 1], [1, 2], [2, 3]]
    assert after.skipped == [0, 1, 0]
    assert trainer.global_step == module.updates == 3
    assert all(v.isfinite().all() for v in three.values())


def test_updates_without_any_step_count_too(poison, tmp_path):
    poison({(update, role) for update in (1, 2) for role in ("generator", "fake_score")})
    module = module_with(SKIP)
    after, trainer = fit(module, 2, tmp_path)
    assert trainer.global_step == module.updates == 2
    assert after.skipped == [2, 2]
    assert after.steps == [[0, 0], [0, 0]]


def test_skipping_the_first_step_warns_of_nothing(poison, tmp_path, recwarn):
    quiet()
    poison({(1, "generator")})
    fit(module_with(SKIP), 2, tmp_path)
    assert not [w for w in recwarn if "lr_scheduler" in str(w.message)]


def test_random_streams_go_on_after_a_skipped_step(poison, tmp_path):
    """A run whose steps change nothing draws the same noise whether or not one is skipped."""
    still = Optimization(learning_rate=0.0, weight_decay=0.0)
    options = {"generator": still, "fake_score": still}
    _, whole = fit(module_with(SKIP, **options), 3, tmp_path)
    poison({(2, "generator"), (2, "fake_score")})
    _, skipped = fit(module_with(SKIP, **options), 3, tmp_path)
    assert float(skipped.callback_metrics["loss"]) == float(whole.callback_metrics["loss"])


def test_too_many_skipped_steps_end_training(poison, tmp_path):
    poison({(update, "generator") for update in (2, 3, 4)})
    with pytest.raises(UserError, match=r"in update 4, after 2 skipped steps in a row, .* with a larger limit"):
        fit(module_with(SKIP), 9, tmp_path)


def test_skipped_steps_are_not_logged_where_none_can_be(tmp_path):
    assert fit(module_with(), 1, tmp_path)[0].skipped == [None]


# Checkpoints.


class Break(Callback):
    """Puts an infinite number into the weights or moments of an update."""

    def __init__(self, update: int, what: str) -> None:
        self.update, self.what = update, what

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        if module.updates == self.update:
            if self.what == "moment":
                first = next(iter(trainer.optimizers[1].state.values()))
                first["exp_avg_sq"].fill_(INF)
            else:
                module.roles.state_dict()[self.what][0, 0, 1] = INF


@pytest.mark.parametrize(
    ("what", "named"),
    [
        ("generator.shift", "state_dict.roles.generator.shift"),
        ("ema.shift", "state_dict.roles.ema.shift"),
        ("moment", "optimizer_states.1.state.0.exp_avg_sq"),
    ],
)
def test_a_checkpoint_that_is_not_finite_is_not_written(tmp_path, what, named):
    message = f"checkpoint: {named} is not finite after update 2; earlier checkpoints are unchanged; lower "
    with pytest.raises(UserError, match=message):
        fit(module_with(), 3, tmp_path, Break(2, what), keeper(tmp_path))
    assert read_checkpoint(str(tmp_path / "last.ckpt"))["provenance"]["updates"] == 1
    assert [path.name for path in tmp_path.glob("*ckpt*")] == ["last.ckpt"]


def test_integers_and_empty_tensors_of_a_checkpoint_are_finite():
    check_finite({"moments": [torch.zeros(2, dtype=torch.uint8)], "nothing": torch.zeros(0)}, "here")


def broken_copy(content: dict, path: Path, name: str) -> Path:
    state = {k: v.clone() for k, v in content["state_dict"].items()}
    state[name].view(-1)[-1] = NAN
    torch.save({**content, "state_dict": state}, path)
    return path


@pytest.fixture(scope="module")
def content(tiny_pipeline, tmp_path_factory) -> dict:
    """A checkpoint that says which model it is of, as those of ``fit``."""
    family = f"{{class_path: SD3Family, init_args: {{path: '{tiny_pipeline}', max_sequence_length: 0}}}}"
    module = tiny.module(tiny_pipeline, DMD)
    module.provenance = Provenance(
        f"model: {{class_path: DMD, init_args: {{family: {family}, height: 32, width: 32}}}}"
    )
    path = tmp_path_factory.mktemp("content") / "last.ckpt"
    tiny.train(module, 1).save_checkpoint(path)
    return read_checkpoint(str(path))


def weight_of(content: dict, role: str) -> str:
    return next(name for name in content["state_dict"] if name.startswith(f"roles.{role}."))


def test_load_module_refuses_a_role_that_is_not_finite(content, tmp_path):
    name = weight_of(content, "ema")
    path = broken_copy(content, tmp_path / "broken.ckpt", name)
    with pytest.raises(UserError, match=rf"checkpoint: {name} is not finite in '{path}'; use an earlier checkpoint"):
        load_module(str(path), role="ema")
    load_module(str(path), role="generator")  # which is intact


@pytest.mark.parametrize("arguments", [["export", "{}", "out"], ["sample", "{}", "prompts.txt", "out"]])
def test_commands_refuse_weights_that_are_not_finite(complaint, content, tmp_path, arguments):
    (tmp_path / "prompts.txt").write_text("a red circle\n")
    path = broken_copy(content, tmp_path / "broken.ckpt", weight_of(content, "ema"))
    assert " is not finite in " in complaint(*[part.format(path) for part in arguments])
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


def test_start_from_refuses_weights_that_are_not_finite(content, tiny_pipeline, tmp_path):
    path = broken_copy(content, tmp_path / "broken.ckpt", weight_of(content, "fake_score"))
    module = tiny.module(tiny_pipeline, DMD, start_from=str(path))
    with pytest.raises(UserError, match=r"fake_score\.\S+ is not finite in "):
        module.configure_model()


def test_resuming_from_weights_that_are_not_finite_is_refused(tmp_path):
    fit(module_with(), 1, tmp_path, keeper(tmp_path))
    content = read_checkpoint(str(tmp_path / "last.ckpt"))
    path = broken_copy(content, tmp_path / "broken.ckpt", "roles.fake_score.gain")
    module = module_with()
    before = {k: v.clone() for k, v in module.roles.state_dict().items()}
    with pytest.raises(UserError, match=r"state_dict\.roles\.fake_score\.gain is not finite in the checkpoint"):
        tiny.trainer(2).fit(module, datamodule=three_prompts(tmp_path), ckpt_path=str(path))
    assert same(before, module.roles.state_dict(), "generator", "ema", "fake_score")
