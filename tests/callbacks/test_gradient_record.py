"""The record holds a row for every judged target, and the images next to it are what was judged."""

import os
import shutil
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
import tiny
import torch
from safetensors.torch import load_file

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.callbacks.gradient_record import COLUMNS, GradientRewardRecord, read_record
from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.advantages import TargetGroup
from gdmd_lightning.metrics.scores import RewardScore

UPDATES, STATES, TARGETS = 6, 8, 3


def table(run: Path):
    return ds.dataset(sorted(map(str, (run / "gradient_rewards").glob("part-*.parquet")))).to_table()


@pytest.fixture
def rows(recorded_run) -> list[dict]:
    return table(recorded_run).to_pylist()


def test_record_columns_are_the_documented_ones(recorded_run):
    schema = table(recorded_run).schema
    types = {"int64": "int64", "int32": "int32", "string": "string", "float32": "float"}
    assert {field.name: str(field.type) for field in schema} == {name: types[kind] for name, kind in COLUMNS.items()}
    assert all(f"``{name}``" in GradientRewardRecord.__doc__ for name in COLUMNS)


def test_record_has_one_row_per_judged_target(rows):
    places = Counter((row["step"], row["rank"], row["state"], row["target"]) for row in rows)
    assert set(places.values()) == {1}
    assert set(places) == {(s, 0, i, j) for s in range(UPDATES) for i in range(STATES) for j in range(TARGETS)}


def test_record_rows_hold_levels_and_rewards_of_their_state(rows):
    for row in rows:
        assert 0 < row["sigma"] <= 1
        assert 0 < row["t"] < 1
        assert row["snapshot"] == 0
        assert row["gradient"] > 0
        assert row["prompt"]
    of_state = {}
    for row in rows:
        of_state.setdefault((row["step"], row["state"]), set()).add((row["sigma"], row["prompt"], row["reward_sample"]))
    assert all(len(found) == 1 for found in of_state.values())


def test_recorded_weight_follows_from_the_advantage(rows, recorded_run):
    module = load_module(str(recorded_run / "checkpoints" / "last.ckpt"), trust=["tiny"])
    clip = module.advantages.clip
    for row in rows:
        o = 0.5 + max(-clip, min(clip, row["advantage"])) / (2 * clip)
        assert row["weight"] == pytest.approx(1 + 2 * module.lambda_policy * (2 * o - 1), abs=1e-5)
    assert len({row["weight"] for row in rows}) > len(rows) / 2


def test_recorded_images_are_those_that_were_judged(rows, recorded_run):
    for step in (0, 4):
        pictures = load_file(recorded_run / "gradient_rewards" / f"pictures-{step:08d}.safetensors")
        assert pictures["samples"].shape == (3, 3, 32, 32)
        assert pictures["targets"].shape == (3, TARGETS, 3, 32, 32)
        assert pictures["samples"].min() >= 0
        assert pictures["samples"].max() <= 1
        reward = tiny.Brightness()
        for row in rows:
            if row["step"] == step and row["state"] < 3:
                target = pictures["targets"][row["state"], row["target"]]
                sample = pictures["samples"][row["state"]]
                assert row["reward_target"] == pytest.approx(reward.score(target[None], []).item(), abs=1e-4)
                assert row["reward_sample"] == pytest.approx(reward.score(sample[None], []).item(), abs=1e-4)


def recorded(pipeline, directory, updates, *, ckpt_path=None, **targets) -> tuple[pl.Trainer, pa.Table]:
    """Train GDMD with a record in ``directory``; the trainer and the record."""
    module = tiny.module(pipeline, targets=TargetGroup(**{"size": 2, **targets}))
    trainer = tiny.trainer(updates, callbacks=[GradientRewardRecord()], default_root_dir=directory)
    data = PromptDataModule("shapes", batch_size=STATES, group_size=4)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return trainer, table(directory)


def test_record_has_no_reward_of_samples_that_were_not_scored(tiny_pipeline, tmp_path):
    _, rows = recorded(tiny_pipeline, tmp_path, 1)
    assert rows["reward_sample"].null_count == STATES * 2


def test_record_distinguishes_snapshots(tiny_pipeline, tmp_path):
    _, found = recorded(tiny_pipeline, tmp_path, 1, over="snapshot", size=3, snapshots=2)
    rows = found.to_pylist()
    assert {(row["target"], row["snapshot"]) for row in rows} == {(0, 0), (1, 1), (2, 2)}
    # All targets of a state have one level and differ only in the fake score.
    assert len({(row["state"], row["t"]) for row in rows}) == STATES


def test_resumed_run_drops_rows_after_its_checkpoint(tiny_pipeline, tmp_path):
    at_two = str(tmp_path / "two.ckpt")
    recorded(tiny_pipeline, tmp_path, 2)[0].save_checkpoint(at_two)
    before, after = (
        recorded(tiny_pipeline, tmp_path, end, ckpt_path=at_two)[1].sort_by("step").to_pylist() for end in (5, 4)
    )
    assert Counter(row["step"] for row in after) == dict.fromkeys(range(4), STATES * 2)
    assert [row for row in before if row["step"] < 2] == [row for row in after if row["step"] < 2]


def test_damaged_part_is_set_aside_and_the_run_goes_on(tiny_pipeline, tmp_path, caplog):
    record = GradientRewardRecord(flush_every=1)
    module = tiny.module(tiny_pipeline)
    tiny.train(module, 2, callbacks=[record], default_root_dir=tmp_path)
    parts = sorted((tmp_path / "gradient_rewards").glob("part-*.parquet"))
    os.truncate(parts[0], parts[0].stat().st_size // 2)
    fitting = tiny.trainer(3, callbacks=[GradientRewardRecord()], default_root_dir=tmp_path)
    fitting.ckpt_path = "last.ckpt"
    fitting.strategy.connect(module)
    with caplog.at_level("INFO"):
        fitting.callbacks[-1].on_train_start(fitting, module)
    assert f"warning: {parts[0]} is damaged and dropped" in caplog.text
    assert sorted(p.name for p in parts[0].parent.iterdir()) == [parts[0].stem + ".damaged", parts[1].name]


def test_resumed_run_with_fewer_ranks_drops_rows_of_all_ranks(recorded_run, tiny_pipeline, tmp_path):
    """Parts and pictures that ranks 1 and 2 wrote belong to rank 0 of a run on one rank."""
    place = tmp_path / "gradient_rewards"
    shutil.copytree(recorded_run / "gradient_rewards", place)
    for rank in (1, 2):
        shutil.copy(place / "part-00000004-0.parquet", place / f"part-00000004-{rank}.parquet")
    record, module = GradientRewardRecord(), tiny.module(tiny_pipeline)
    trainer = tiny.trainer(1, default_root_dir=tmp_path)
    trainer.ckpt_path = "last.ckpt"
    module.updates = 4
    record.on_train_start(trainer, module)
    assert set(table(tmp_path)["step"].to_pylist()) == {0, 1, 2, 3}
    assert {path.name for path in place.iterdir() if "pictures" in path.name} == {"pictures-00000000.safetensors"}


def test_record_of_another_run_is_refused_and_kept(recorded_run, tiny_pipeline, tmp_path):
    shutil.copytree(recorded_run / "gradient_rewards", tmp_path / "gradient_rewards")
    before = table(tmp_path)
    with pytest.raises(UserError, match="gradient_rewards: it has the record of another run; "):
        tiny.train(tiny.module(tiny_pipeline), 1, callbacks=[GradientRewardRecord()], default_root_dir=tmp_path)
    assert table(tmp_path) == before


def test_read_record_is_sorted_and_refuses_a_run_without_one(recorded_run, tmp_path):
    rows = read_record(recorded_run).select(["step", "state", "target"]).to_pylist()
    places = [tuple(row.values()) for row in rows]
    assert places == sorted(places)
    assert len(places) == UPDATES * STATES * TARGETS
    with pytest.raises(UserError, match="it has no record of gradient rewards; ") as refused:
        read_record(tmp_path)
    assert refused.value._render_traceback_() == [f"error: {refused.value}"]


def test_record_of_a_method_without_targets_is_refused_before_loading(tiny_pipeline, monkeypatch):
    from gdmd_lightning.methods.dmd import DMD

    module = tiny.module(tiny_pipeline, DMD)
    monkeypatch.setattr(type(module.family), "load", lambda family: pytest.fail("loaded"))
    with pytest.raises(UserError, match="DMD judges no targets"):
        tiny.train(module, 1, callbacks=[GradientRewardRecord()])


def test_recording_does_not_change_the_run(tiny_pipeline, tmp_path):
    alone, watched = tiny.module(tiny_pipeline), tiny.module(tiny_pipeline)
    tiny.train(alone, 2)
    tiny.train(watched, 2, callbacks=[GradientRewardRecord(pictures_every=1)], default_root_dir=tmp_path)
    assert (tmp_path / "gradient_rewards" / "part-00000000-0.parquet").is_file()
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), watched.parameters(), strict=True))


def test_a_fast_dev_run_leaves_no_record_and_no_pictures(tiny_pipeline, tmp_path):
    score = RewardScore(tiny.Brightness())
    for _ in range(2):
        tests = GenerationEvaluation([score], count=6, columns=1, teacher_steps=2, every_n_updates=1)
        callbacks = [GradientRewardRecord(flush_every=1, pictures_every=1), tests]
        tiny.train(tiny.module(tiny_pipeline), 2, callbacks=callbacks, default_root_dir=tmp_path, fast_dev_run=2)
        assert set(tests.teacher) == {f"brightness/{task}" for task in score.figures(tests.prompts)}
    assert list(tmp_path.iterdir()) == []


def test_a_fast_dev_run_of_the_command_line_leaves_nothing(fast_fit, tmp_path):
    place = tmp_path / "nothing"
    for _ in range(2):
        training.run([*fast_fit, "--trainer.fast_dev_run=2", f"--trainer.default_root_dir={place}"])
    assert [each for each in place.rglob("*") if each.is_file()] == []
    assert not (tmp_path / "run").exists()
