"""PromptDataModule yields groups of prompts, and a resumed run continues exactly where training was."""

import multiprocessing
import signal
import subprocess
from itertools import chain, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerState

from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import PromptBatch

ROWS = 10

pytestmark = pytest.mark.filterwarnings("ignore:.*(GPU|worker|checkpoint|LeafSpec).*")


class Recorder(LightningModule):
    """Records the prompts of every step; can save a checkpoint during or after a step."""

    def __init__(self, save: dict[str, tuple[int, Path]] | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[str]] = []
        self.save = save or {}

    def training_step(self, batch: PromptBatch, batch_idx: int) -> torch.Tensor:
        assert isinstance(batch, PromptBatch)
        self.seen.append([prompt.text for prompt in batch.prompts])
        self._save("within")
        return self.weight.sum()

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        assert isinstance(batch, torch.Tensor)

    def on_train_batch_end(self, *args: Any) -> None:
        self._save("after")

    def on_train_epoch_end(self) -> None:
        self._save("epoch")

    def _save(self, when: str) -> None:
        step, path = self.save.get(when, (None, None))
        if step == len(self.seen):
            self.trainer.save_checkpoint(path)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, **{"max_epochs": -1, **quiet, **options})


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {i}\n" for i in range(ROWS)))
    return str(path)


def data(source: str, **options: Any) -> PromptDataModule:
    return PromptDataModule(source, **{"batch_size": 6, "group_size": 2, "shuffle_buffer": 4, **options})


def by_hand(source: str, count: int, **options: Any) -> list[list[str]]:
    """The uninterrupted stream, read without a trainer."""
    return [
        [prompt.text for prompt in batch.prompts] for batch in islice(data(source, **options).train_dataloader(), count)
    ]


def test_batch_consists_of_groups_of_equal_prompts(source: str) -> None:
    batch = next(iter(data(source).train_dataloader()))
    assert isinstance(batch, PromptBatch)
    assert (len(batch), batch.group_size, batch.groups.tolist()) == (6, 2, [0, 0, 1, 1, 2, 2])
    assert [prompt.text for prompt in batch.prompts[0::2]] == [prompt.text for prompt in batch.prompts[1::2]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 6, "group_size": 4},
            "data.group_size: group_size 4 does not divide batch_size 6; .* such as 8",
        ),
        ({"batch_size": 0}, "PromptDataModule.batch_size: it is 0; use an integer of at least 1"),
        ({"group_size": -1}, "PromptDataModule.group_size: it is -1"),
        ({"shuffle_buffer": -1}, "PromptDataModule.shuffle_buffer: it is -1; use an integer of at least 0"),
        ({"num_workers": -1}, "PromptDataModule.num_workers: it is -1"),
        ({"source": "nowhere.txt"}, "nowhere.txt: no such file"),
    ],
)
def test_constructor_refuses_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PromptDataModule(**options)


def test_default_source_is_shapes() -> None:
    assert len(next(iter(PromptDataModule().train_dataloader()))) == 64


@pytest.mark.parametrize("num_workers", [0, 2])
def test_trainer_receives_the_stream_in_order(source: str, num_workers: int) -> None:
    model = Recorder()
    trainer(max_steps=9).fit(model, datamodule=data(source, num_workers=num_workers))
    assert model.seen == by_hand(source, 9)


def test_lightnings_epochs_do_not_restart_the_stream(source: str) -> None:
    model = Recorder()
    trainer(max_epochs=3, limit_train_batches=3).fit(model, datamodule=data(source))
    assert model.seen == by_hand(source, 9)


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precision_plugins_do_not_change_prompts(source: str, precision: Any) -> None:
    model = Recorder()
    trainer(max_steps=2, precision=precision).fit(model, datamodule=data(source))
    assert model.seen == by_hand(source, 2)


# The last two cases change the number of workers, which must not affect the order.
@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0), (0, 3)])
@pytest.mark.parametrize("stop", [2, 5])
def test_resumed_run_equals_an_uninterrupted_one(
    source: str, tmp_path: Path, before: int, after: int, stop: int
) -> None:
    path = tmp_path / "run.ckpt"
    first = Recorder({"after": (stop, path)})
    # One step after the checkpoint, and batches read ahead: neither may count.
    trainer(max_steps=stop + 1).fit(first, datamodule=data(source, num_workers=before))
    resumed = Recorder()
    trainer(max_steps=9).fit(resumed, datamodule=data(source, num_workers=after), ckpt_path=path)
    assert first.seen[:stop] + resumed.seen == by_hand(source, 9)


def test_run_resumed_twice_equals_an_uninterrupted_one(source: str, tmp_path: Path) -> None:
    paths = [tmp_path / "first.ckpt", tmp_path / "second.ckpt"]
    models = [Recorder({"after": (2, paths[0])}), Recorder({"after": (3, paths[1])}), Recorder()]
    for model, steps, path in zip(models, (2, 5, 9), [None, *paths], strict=True):
        trainer(max_steps=steps).fit(model, datamodule=data(source), ckpt_path=path)
    assert [len(model.seen) for model in models] == [2, 3, 4]
    assert list(chain.from_iterable(model.seen for model in models)) == by_hand(source, 9)


def test_interrupted_step_is_repeated(source: str, tmp_path: Path) -> None:
    paths = [tmp_path / "first.ckpt", tmp_path / "second.ckpt"]
    trainer(max_steps=3).fit(Recorder({"within": (3, paths[0])}), datamodule=data(source))
    # At the second interruption Lightning's counters are still off by one from the first.
    resumed = Recorder({"within": (2, paths[1])})
    trainer(max_steps=6).fit(resumed, datamodule=data(source), ckpt_path=paths[0])
    again = Recorder()
    trainer(max_steps=6).fit(again, datamodule=data(source), ckpt_path=paths[1])
    assert resumed.seen == by_hand(source, 6)[2:]
    assert again.seen == by_hand(source, 6)[3:]


def test_checkpoint_at_the_end_of_an_epoch_resumes_with_the_next_batch(source: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    options = {"max_epochs": 3, "limit_train_batches": 3}
    trainer(**options).fit(Recorder({"epoch": (3, path)}), datamodule=data(source))
    resumed = Recorder()
    trainer(**options).fit(resumed, datamodule=data(source), ckpt_path=path)
    assert resumed.seen == by_hand(source, 9)[3:]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 4}, "6 samples of an update on all ranks (now 4)"),
        ({"group_size": 3}, "group_size 2 (now 3)"),
        ({"shuffle_buffer": 5}, "shuffle_buffer 4 (now 5)"),
        ({"seed": 1}, "seed 0 (now 1)"),
        ({"batch_size": 2, "seed": 3}, "6 samples of an update on all ranks (now 2), seed 0 (now 3)"),
        ({"source": "shapes"}, "(now 'shapes', whose content differs)"),
    ],
)
def test_position_is_refused_under_other_settings(source: str, changes: dict[str, Any], message: str) -> None:
    state = data(source).state_dict()
    with pytest.raises(UserError) as caught:
        data(**{"source": source, **changes}).load_state_dict(state)
    assert message in str(caught.value)


def test_trainer_refuses_a_position_of_another_number_of_samples(source: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    trainer(max_steps=2).fit(Recorder({"after": (2, path)}), datamodule=data(source))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["PromptDataModule"]["batch_size"] = 64
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"prompts with 64 samples of an update on all ranks \(now \d+\)"):
        trainer(max_steps=4).fit(Recorder(), datamodule=data(source), ckpt_path=path)


class OnSecondRank:
    """As much of a trainer as the position needs."""

    global_rank, world_size = 1, 2
    state = TrainerState(fn=TrainerFn.FITTING)


def test_refused_samples_name_the_global_batch_that_goes_on(source: str) -> None:
    shared = PromptDataModule(source, batch_size=4, group_size=2)
    shared.trainer = OnSecondRank()
    shared.divide(2)
    alone = PromptDataModule(source, batch_size=4, group_size=2)
    with pytest.raises(UserError) as caught:
        alone.load_state_dict(shared.state_dict())
    assert str(caught.value) == (
        "data: the checkpoint counts its prompts with 8 samples of an update on all ranks (now 4); "
        "set data.global_batch_size 8, or start a new run from its weights"
    )
    PromptDataModule(source, batch_size=4, group_size=2, global_batch_size=8).load_state_dict(shared.state_dict())


@pytest.mark.parametrize(
    ("options", "saved"),
    [({"batch_size": 4}, {"batch_size": 6}), ({"batch_size": 4, "shuffle_buffer": 3}, {}), ({"batch_size": 8}, {})],
    ids=["not divisible", "other settings too", "another source"],
)
def test_a_global_batch_that_would_not_help_is_not_named(source: str, options: dict, saved: dict) -> None:
    module = PromptDataModule(source, group_size=2, **options)
    module.trainer = OnSecondRank()
    module.divide(2)
    state = {**PromptDataModule(source, batch_size=8, group_size=2).state_dict(), "batches": 1, **saved}
    state["content"] = state["content"] if options["batch_size"] == 4 else "other"
    with pytest.raises(UserError, match=r"; resume with the values of the checkpoint, or start a new run"):
        module.load_state_dict(state)


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"global_batch_size": 8}])
def test_position_does_not_depend_on_how_many_ranks_share_the_samples(source: str, options: dict[str, int]) -> None:
    def texts(module: PromptDataModule) -> list[str]:
        return [prompt.text for prompt in next(iter(module._stream())).prompts]

    alone = PromptDataModule(source, batch_size=8, group_size=2)
    half = PromptDataModule(source, group_size=2, **options)
    half.trainer = OnSecondRank()
    half.divide(2)
    for module in (alone, half):
        module._handed_over = 3
    assert alone.state_dict() == half.state_dict()
    assert texts(half) == texts(alone)[4:]
    half.load_state_dict(alone.state_dict())
    assert half.batches_consumed == 3


@pytest.mark.parametrize(
    ("ranks", "accumulate", "message"),
    [
        (3, 1, "16 samples cannot be divided over 3 ranks in groups of 4; use a multiple of 12, such as 24"),
        (8, 1, "16 samples cannot be divided over 8 ranks in groups of 4; use a multiple of 32, such as 32"),
        (2, 2, "model.accumulate: it is 2, but data.global_batch_size says how many samples an update has"),
    ],
)  # fmt: skip
def test_samples_of_an_update_that_cannot_be_divided_are_refused(ranks: int, accumulate: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        PromptDataModule("shapes", global_batch_size=16, group_size=4).divide(ranks, accumulate)
    assert message in str(caught.value)


def test_groups_must_divide_the_samples_of_all_ranks() -> None:
    with pytest.raises(UserError, match=r"group_size 4 does not divide global_batch_size 18"):
        PromptDataModule("shapes", global_batch_size=18, group_size=4)
    assert PromptDataModule("shapes", global_batch_size=8, batch_size=3, group_size=4).samples == 8


def test_checkpoint_of_other_prompts_can_be_evaluated(source: str, tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    trainer(max_steps=2).fit(Recorder({"after": (2, path)}), datamodule=data(source))

    class WithImages(PromptDataModule):
        def val_dataloader(self) -> list[torch.Tensor]:
            return [torch.zeros(2)]

    WithImages.__qualname__ = PromptDataModule.__qualname__  # Lightning's key for the state
    trainer().validate(Recorder(), datamodule=WithImages("shapes"), ckpt_path=path)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="SIGTERM is not ignored here")
def test_reading_processes_survive_a_signal_to_the_group_but_not_to_be_ended_by_training(source: str) -> None:
    batches = iter(data(source, num_workers=1).train_dataloader())
    next(batches)
    (worker,) = multiprocessing.active_children()
    for name in ("INT", "HUP", "USR1", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    for _ in range(9):  # more than are read ahead
        next(batches)
    for _ in range(20):  # one that arrives before the last was received is lost
        worker.terminate()
        worker.join(0.5)
        if worker.exitcode is not None:
            break
    assert worker.exitcode == 0


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_row_ends_training_with_an_error_that_names_it(source: str, num_workers: int) -> None:
    with open(source, "ab") as file:
        file.write(b"Fu\xdf\n")
    with pytest.raises(UserError) as caught:
        trainer(max_steps=9).fit(Recorder(), datamodule=data(source, num_workers=num_workers))
    assert str(caught.value).startswith(f"{source}:{ROWS + 1}: not UTF-8")
    assert "Traceback" not in str(caught.value)


def test_reading_prompts_does_not_use_torchs_global_random_stream(source: str) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(data(source).train_dataloader()))
    assert torch.equal(torch.get_rng_state(), before)
