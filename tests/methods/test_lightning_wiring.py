"""What Lightning adds to an update: optimizers, clipping, warm-up, counting, checkpoints, ranks, logs."""

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from world import THREE as TEXTS
from world import GaussianFamily, Liking, PlainEngine, World, module_of, three_prompts

from gdmd_lightning.callbacks.evaluation_budget import EvaluationBudget
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.methods.refl import ReFL
from gdmd_lightning.methods.settings import Matching
from gdmd_lightning.rewards.combine import CombinedReward
from gdmd_lightning.roles import Optimization
from gdmd_lightning.streams import draw_uniform

SLOW, FAST = Optimization(learning_rate=1e-3, warmup=1), Optimization(learning_rate=3e-2, warmup=1)


class Weights(Callback):
    """Weights of all roles, learning rates and logged figures after every update."""

    def __init__(self) -> None:
        self.weights, self.rates, self.logs, self.outputs = [], [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        self.weights.append({k: v.clone() for k, v in module.roles.state_dict().items()})
        self.rates.append([optimizer.param_groups[0]["lr"] for optimizer in trainer.optimizers])
        self.logs.append({k: float(v) for k, v in trainer.callback_metrics.items()})
        self.outputs.append(outputs)


def fit(module, updates: int, *, place: Path | None = None, resume: Path | None = None, **options) -> Weights:
    """Train; a run to resume needs its prompts in the same place."""
    seen = Weights()
    with TemporaryDirectory() as temporary:
        trainer = tiny.trainer(updates, callbacks=[seen, *options.pop("callbacks", [])], **options)
        trainer.fit(
            module,
            datamodule=three_prompts(place or Path(temporary)),
            ckpt_path=None if resume is None else str(resume),
        )
    return seen


def evaluations_of_an_update(module) -> int:
    fit(module, 1)
    return module.roles.evaluations.total()


def change(before, after, role: str) -> float:
    return max(float((after[k] - before[k]).abs().max()) for k in before if k.startswith(f"{role}."))


def start(module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.roles.state_dict().items()}


# Optimizers.


def test_each_role_is_stepped_with_its_own_settings():
    module = module_of(generator=SLOW, fake_score=FAST, matching=Matching(fake_score_updates=1))
    before = start(module)
    after = fit(module, 1).weights[0]
    # Adam's first step is the learning rate.
    assert change(before, after, "generator") == pytest.approx(1e-3, rel=0.05)
    assert change(before, after, "fake_score") == pytest.approx(3e-2, rel=0.05)


def test_teacher_never_moves():
    module = module_of(generator=FAST, fake_score=FAST)
    before = start(module)
    assert change(before, fit(module, 3).weights[-1], "teacher") == 0


def test_learning_rates_warm_up_once_per_update():
    module = module_of(
        generator=Optimization(learning_rate=1e-2, warmup=4), fake_score=Optimization(learning_rate=1e-3, warmup=2)
    )
    rates = fit(module, 5).rates
    # As they are after each update, that is, for the next.
    assert [rate[0] for rate in rates] == pytest.approx([0.5e-2, 0.75e-2, 1e-2, 1e-2, 1e-2])
    assert [rate[1] for rate in rates] == pytest.approx([1e-3] * 5)


def test_first_update_has_the_warm_ups_first_learning_rate():
    module = module_of(generator=Optimization(learning_rate=1e-2, warmup=4))
    before = start(module)
    assert change(before, fit(module, 1).weights[0], "generator") == pytest.approx(0.25e-2, rel=0.05)


def test_all_optimizer_settings_reach_the_optimizer():
    settings = Optimization(learning_rate=1e-3, betas=(0.5, 0.7), weight_decay=0.3, warmup=1)
    module = module_of(generator=settings)
    generator, fake_score = (entry["optimizer"] for entry in module.configure_optimizers())
    assert isinstance(generator, torch.optim.AdamW)
    group = generator.param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-3, (0.5, 0.7), 0.3)
    assert fake_score.param_groups[0]["weight_decay"] == 0.01
    assert [id(p) for p in group["params"]] == [id(p) for p in module.roles.parameters_of("generator")]


class Norms(Callback):
    """Gradient norms at the moment of each optimizer step, by role."""

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {"generator": [], "fake_score": []}

    def on_fit_start(self, trainer, module):
        # A hook on the optimizer itself: Lightning's own is not called for every step.
        for role, optimizer in zip(module.roles.trained, trainer.optimizers, strict=True):
            optimizer.register_step_pre_hook(lambda opt, *_, role=role: self.seen[role].append(norm(opt)))


def norm(optimizer) -> float:
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    return float(torch.stack([g.norm() for g in gradients]).norm())


def test_gradients_are_clipped_to_each_roles_own_norm():
    norms = Norms()
    module = module_of(
        generator=Optimization(gradient_clip=1e-3),
        fake_score=Optimization(gradient_clip=2e-3),
        matching=Matching(fake_score_updates=2),
    )
    fit(module, 2, callbacks=[norms])
    assert norms.seen["generator"] == pytest.approx([1e-3] * 2, rel=1e-3)
    assert norms.seen["fake_score"] == pytest.approx([2e-3] * 4, rel=1e-3)


def test_gradients_below_the_limit_are_those_of_a_plain_update():
    norms = Norms()
    clip = Optimization(gradient_clip=1e6)
    fit(module_of(generator=clip, fake_score=clip), 1, callbacks=[norms])
    plain = World(DMD)
    for role, gain in (("teacher", 1.0), ("generator", 0.4), ("fake_score", 0.7)):
        plain.set(role, gain=gain, shift=0.0, variance=0.5)
    engine = PlainEngine(plain.roles)
    plain.module.update(plain.batch, engine)
    gradient = engine.steps[0].gradient.values()
    assert norms.seen["generator"][0] == pytest.approx(
        float(torch.stack([g.norm() for g in gradient]).norm()), rel=1e-3
    )


def test_a_step_forgets_the_gradients_of_the_one_before():
    norms = Norms()
    still = Optimization(learning_rate=0.0, gradient_clip=1e6, weight_decay=0.0)
    module = module_of(generator=still, fake_score=still, matching=Matching(fake_score_updates=40))
    fit(module, 1, callbacks=[norms])
    late, early = (sum(part) for part in (norms.seen["fake_score"][-5:], norms.seen["fake_score"][:5]))
    assert late < 4 * early


def test_average_and_generator_of_a_run_follow_the_same_steps():
    module = module_of(generator=FAST, ema_decay=0.5)
    before = start(module)
    after = fit(module, 1).weights[0]
    expected = 0.5 * before["ema.shift"] + 0.5 * after["generator.shift"]
    torch.testing.assert_close(after["ema.shift"], expected)


# Counting and checkpoints.


@pytest.mark.parametrize("options", [{"matching": Matching(fake_score_updates=3)}, {}], ids=["3 turns", "5 turns"])
def test_trainer_counts_one_step_per_update(options):
    module = module_of(**options)
    seen = fit(module, 4)
    assert len(seen.weights) == 4
    assert module.updates == 4
    assert module.trainer.global_step == 4


def saved(module, updates: int, path: Path) -> Weights:
    seen = fit(module, updates)
    module.trainer.save_checkpoint(path)
    return seen


def test_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = fit(module_of(generator=FAST, fake_score=FAST), 4)
    saved(module_of(generator=FAST, fake_score=FAST), 2, tmp_path / "half.ckpt")
    module, seen = module_of(generator=FAST, fake_score=FAST), Weights()
    fitting = tiny.trainer(4, callbacks=[seen])
    content = torch.load(tmp_path / "half.ckpt", weights_only=True)
    content.pop("PromptDataModule")  # its file has moved
    torch.save(content, tmp_path / "half.ckpt")
    fitting.fit(module, datamodule=three_prompts(tmp_path), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert module.updates == 4
    assert tiny.differing(whole.weights[-1], seen.weights[-1]) == []
    assert whole.rates[-1] == seen.rates[-1]


def test_checkpoint_has_no_teacher_and_its_own_count(tmp_path):
    saved(module_of(), 2, tmp_path / "one.ckpt")
    content = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert content["provenance"]["updates"] == 2
    assert {name.split(".")[1] for name in content["state_dict"]} == {"generator", "ema", "fake_score"}


def test_evaluations_are_those_of_the_updates_and_stay_in_the_checkpoint(tmp_path):
    class Sampling(Callback):
        """Evaluates networks outside the updates, as an evaluation does."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
            module.generate(torch.zeros(2, *module.latent_shape), list(TEXTS[:2]))

    module = module_of(matching=Matching(fake_score_updates=1))
    fit(module, 3, callbacks=[Sampling()])
    per_update = evaluations_of_an_update(module_of(matching=Matching(fake_score_updates=1)))
    assert module.evaluations == 3 * per_update
    path = tmp_path / "one.ckpt"
    trainer = tiny.trainer(2, callbacks=[])
    trainer.fit(first := module_of(matching=Matching(fake_score_updates=1)), datamodule=three_prompts(tmp_path))
    trainer.save_checkpoint(path)
    second = module_of(matching=Matching(fake_score_updates=1))
    tiny.trainer(3, callbacks=[]).fit(
        second, datamodule=three_prompts(tmp_path), ckpt_path=str(path), weights_only=True
    )
    assert first.evaluations == 2 * per_update
    assert second.evaluations == 3 * per_update


def test_budget_of_evaluations_ends_the_training_with_the_update_that_reaches_it(tmp_path):
    per_update = evaluations_of_an_update(module_of(matching=Matching(fake_score_updates=1)))
    for budget, updates in ((2 * per_update, 2), (2 * per_update + 1, 3)):
        module = module_of(matching=Matching(fake_score_updates=1))
        fit(module, 9, callbacks=[EvaluationBudget(budget)])
        assert module.updates == updates


def test_start_from_takes_every_role_over(tmp_path):
    module = module_of(generator=FAST, fake_score=FAST, ema_decay=0.9)
    saved(module, 3, tmp_path / "one.ckpt")
    other = DMD(GaussianFamily(), height=16, width=24, start_from=str(tmp_path / "one.ckpt"))
    other.configure_model()
    assert tiny.differing(module.roles.state_dict(), other.roles.state_dict()) == []
    assert other.updates == 0


def test_start_from_starts_a_follower_that_is_not_there_from_its_source(tmp_path):
    module = module_of(generator=FAST, fake_score=FAST, ema_decay=0.9)
    saved(module, 3, tmp_path / "one.ckpt")
    other = GDMD(GaussianFamily(), Liking(), height=16, width=24, start_from=str(tmp_path / "one.ckpt"))
    other.configure_model()
    generator, old = (other.roles.standalone(role).state_dict() for role in ("generator", "old"))
    assert tiny.differing(generator, old) == []


# Ranks, random streams, logs.


def test_streams_differ_by_update_rank_turn_purpose_and_seed(monkeypatch):
    def first(module, purpose="renoise", turn=0):
        return float(draw_uniform((1,), module.stream(purpose, turn)))

    module = module_of()
    found = [first(module), first(module, "rollout"), first(module, turn=1), first(module_of(seed=1))]
    module.updates = 1
    found.append(first(module))
    module.updates = 0
    assert first(module) == found[0]
    monkeypatch.setattr(DMD, "global_rank", 1)
    monkeypatch.setattr(DMD, "world_size", 2)
    found.append(first(module))
    assert len(set(found)) == len(found)


def test_data_module_passes_its_trainers_rank_on():
    class Of:
        global_rank, world_size = 1, 3

    data = PromptDataModule("shapes", batch_size=4, group_size=2)
    alone = next(iter(data.train_dataloader()))
    data.trainer = Of()
    stream = data._stream()
    assert (stream.rank, stream.world_size) == (1, 3)
    assert next(iter(stream)).prompts != alone.prompts


def test_training_hands_the_method_prompts_groups_and_their_embeddings():
    module, batches = module_of(), []
    update = module.update
    module.update = lambda batch, learn: (batches.append(batch), update(batch, learn))[1]
    fit(module, 1)
    (batch,) = batches
    assert [prompt.text for prompt in batch.prompts] == [text for text in TEXTS for _ in range(2)]
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 2]
    expected = torch.tensor([[float(word) for word in prompt.text.split()] for prompt in batch.prompts])
    torch.testing.assert_close(batch.conditioning.sequence[:, 0], expected)


@pytest.mark.parametrize(("method", "options"), [(DMD, {}), (GDMD, {"reward": Liking()}), (ReFL, {"reward": Liking()})])
def test_logged_figures_are_those_of_the_update(method, options):
    module, updates = module_of(method, **options), []
    update = module.update
    module.update = lambda batch, learn: (updates.append(update(batch, learn)), updates[-1])[1]
    seen = fit(module, 1)
    logs = {name: float(value) for name, value in updates[0].logs.items()}
    expected = {"loss": logs.pop("loss"), **{f"train/{name}": value for name, value in logs.items()}}
    added = ("train/grad_norm/", "train/learning_rate/", "train/seconds", "step")
    assert {k: v for k, v in seen.logs[0].items() if not k.startswith(added)} == pytest.approx(expected)


def test_gradient_norms_are_logged_before_clipping_and_averaged_over_a_roles_steps():
    clip = Optimization(gradient_clip=1e-3, learning_rate=0.0, weight_decay=0.0)
    module = module_of(generator=clip, fake_score=clip, matching=Matching(fake_score_updates=3))
    plain = World(DMD, matching=Matching(fake_score_updates=3))
    for role, gain in (("teacher", 1.0), ("generator", 0.4), ("fake_score", 0.7)):
        plain.set(role, gain=gain, shift=0.0, variance=0.5)
    _, steps = plain.update()
    found = {role: [float(length(s.gradient)) for s in steps if s.role == role] for role in ("generator", "fake_score")}
    logs = fit(module, 1).logs[0]
    for role, norms in found.items():
        assert logs[f"train/grad_norm/{role}"] == pytest.approx(sum(norms) / len(norms), rel=1e-3)


def length(gradient: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack([g.norm() for g in gradient.values()]).norm()


def test_learning_rate_of_each_update_and_role_is_logged():
    falling = Optimization(learning_rate=4.0e-3, warmup=1, schedule="linear")
    seen = fit(module_of(generator=falling, fake_score=Optimization(learning_rate=1e-3, warmup=2)), 4)
    found = [[logs[f"train/learning_rate/{role}"] for role in ("generator", "fake_score")] for logs in seen.logs]
    assert found == [pytest.approx(pair) for pair in ([4e-3, 5e-4], [3e-3, 1e-3], [2e-3, 1e-3], [1e-3, 1e-3])]


def test_falling_schedule_is_refused_before_anything_is_loaded_in_a_run_without_an_end(monkeypatch):
    module = DMD(GaussianFamily(), fake_score=Optimization(schedule="cosine"))
    monkeypatch.setattr(GaussianFamily, "load", None)
    with pytest.raises(UserError, match=r"model\.fake_score\.schedule: a cosine schedule ends at trainer\.max_steps"):
        fit(module, -1)


@pytest.mark.parametrize("end", [4, 8])
def test_resumed_schedule_is_that_of_a_run_of_the_new_length(tmp_path, end):
    falling = Optimization(learning_rate=1e-3, warmup=2, schedule="cosine")
    options = {"generator": falling, "fake_score": falling}
    keep = Saving(tmp_path / "two.ckpt", 2)
    fit(module_of(**options), 4, place=tmp_path, callbacks=[keep])
    resumed, whole = module_of(**options), module_of(**options)
    again, alone = fit(resumed, end, place=tmp_path, resume=keep.path), fit(whole, end)
    names = ("train/learning_rate/generator", "train/learning_rate/fake_score")
    assert [[logs[n] for n in names] for logs in again.logs] == [[logs[n] for n in names] for logs in alone.logs[2:]]
    # The first two updates are the warm-up, which does not depend on the end.
    assert tiny.differing(dict(resumed.state_dict()), dict(whole.state_dict())) == []


class Saving(Callback):
    """Saves one checkpoint."""

    def __init__(self, path: Path, update: int) -> None:
        self.path, self.update = path, update

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index):
        if module.updates == self.update:
            trainer.save_checkpoint(self.path)


def test_record_reaches_callbacks_where_one_is_kept():
    record = fit(module_of(GDMD, reward=Liking()), 1).outputs[0]["record"]
    assert [prompt.text for prompt in record.prompts] == [text for text in TEXTS for _ in range(2)]
    assert fit(module_of(), 1).outputs[0]["record"] is None


# Sampling.


def test_generate_takes_the_few_steps_of_the_role_that_is_asked(float64):
    world = World(DMD, steps=2)
    noise = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    texts = list(TEXTS[:2])
    c = world.module.family.encode(texts).sequence[:, 0]
    for role in ("ema", "generator"):
        images = world.module.generate(noise, texts, role=role)
        one, middle = torch.ones(2), torch.full((2,), 0.6)
        x0 = world.x0(role, noise, one, c)
        x = 0.4 * x0 + 0.6 * noise  # at sigma 1 the noise is the input itself
        expected = world.module.family.decode(world.x0(role, x, middle, c))
        torch.testing.assert_close(images, expected)
    torch.testing.assert_close(world.module.generate(noise, texts), world.module.generate(noise, texts, role="ema"))


def test_teacher_is_sampled_with_guidance_on_its_own_levels(float64):
    world = World(DMD)
    noise = torch.randn(2, 2, 2, 3, generator=torch.Generator().manual_seed(0))
    texts = list(TEXTS[:2])
    world.module.generate_teacher(noise, texts, 5, 2.5)
    asked = world.questions("teacher")
    assert [float(q.sigma[0]) for q in asked] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert {q.guidance_scale for q in asked} == {2.5}


@pytest.mark.parametrize("wrong", ["generator", "autoencoder"])
def test_sampling_refuses_pictures_that_are_not_finite(monkeypatch, wrong):
    module = module_of()
    if wrong == "generator":
        module.roles.standalone("ema").gain.data.fill_(float("nan"))
    else:
        monkeypatch.setattr(GaussianFamily, "decode", lambda self, latents: latents * float("nan"))
    with pytest.raises(UserError, match=f"{wrong}: 2 of 2 pictures are not finite, the first with prompt '0.5 -1.0'"):
        module.generate(torch.randn(2, 2, 2, 3), list(TEXTS[:2]))


class Unready(tiny.Brightness):
    """Says that its weights are missing."""

    def prepare(self):
        raise UserError("no weights")


def test_reward_of_a_training_is_loaded_before_its_teacher(tmp_path, monkeypatch):
    reward = CombinedReward([tiny.Brightness(), Unready()], [1.0, 1.0])
    monkeypatch.setattr(GaussianFamily, "load", None)
    with pytest.raises(UserError, match=r"^no weights$"):
        tiny.trainer(1).fit(ReFL(GaussianFamily(), reward=reward), datamodule=three_prompts(tmp_path))


def test_lightnings_monitor_of_learning_rates_logs_every_update_of_the_warm_up(tiny_pipeline, tmp_path):
    warming = Optimization(learning_rate=4e-3, warmup=4)
    module = tiny.module(tiny_pipeline, ReFL, reward=tiny.Brightness(), steps=2, generator=warming)
    monitor = LearningRateMonitor()
    tiny.train(module, 3, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert [round(rate, 6) for rate in monitor.lrs["lr-AdamW"]] == [1e-3, 2e-3, 3e-3]
