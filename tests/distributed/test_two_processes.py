"""Two gloo processes train one generator: on disjoint prompts from the command line, and in shards as one process."""

import json
from pathlib import Path

import pytest
from cases import DATA, build
from processes import run_ranks
from test_deepspeed import IN_SHARDS, LORA, assert_same_run, assert_shards_of, run_cases
from together import train_together

HERE = Path(__file__).parent
UPDATES = 3


@pytest.fixture
def two_ranks(run_cli, fast_fit, tmp_path, monkeypatch):
    """A function that runs ``fit`` on two ranks and returns the digest of each; by default Lightning starts them."""

    def run(*arguments: str, launch: bool = True) -> list[dict]:
        digest = tmp_path / "digest.yaml"
        keeper = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 2, save_last: true, save_top_k: 0}}"
        mine = f"{{class_path: digest.Digest, init_args: {{directory: {tmp_path}}}}}"
        record = "{class_path: GradientRewardRecord, init_args: {pictures_every: 2, pictures: 1}}"
        scores = "[{class_path: GenEvalScore}], count: 6, columns: 2, teacher_steps: 2"
        evaluation = f"{{class_path: GenerationEvaluation, init_args: {{scores: {scores}}}}}"
        digest.write_text(f"trainer: {{callbacks: [{keeper}, {record}, {evaluation}, {mine}]}}\n")
        two = [f"--trainer.max_steps={UPDATES}", "--trainer.devices=2"]
        command = ["fit", *fast_fit, "--config", digest, *two, *arguments]
        if launch:
            run_cli(*command, check=True)
        else:
            monkeypatch.chdir(tmp_path)
            run_ranks(HERE / "command_line.py", *command)
        return [json.loads((tmp_path / f"digest-{rank}.json").read_text()) for rank in (0, 1)]

    return run


def test_ranks_end_with_the_same_networks_from_different_prompts(two_ranks, tmp_path):
    one, other = two_ranks("--trainer.strategy=ddp", launch=False)
    assert one["updates"] == other["updates"] == UPDATES
    assert one["digests"] == other["digests"]
    assert len(set(one["digests"].values())) == 5, "some roles are equal"
    assert [len(batch) for batch in one["prompts"]] == [len(batch) for batch in other["prompts"]] == [8] * UPDATES
    import pyarrow.dataset as ds

    parts = sorted((tmp_path / "run" / "gradient_rewards").glob("part-*.parquet"))
    rows = ds.dataset(list(map(str, parts))).to_table().to_pylist()
    assert {row["rank"] for row in rows} == {0, 1}
    assert (tmp_path / "run" / "pictures" / f"{UPDATES:06d}.png").is_file()
    kept = tmp_path / "run" / "evaluations" / "shapes" / f"{UPDATES:06d}"
    listed = [json.loads(line)["file"] for line in (kept / "pictures.jsonl").read_text().splitlines()]
    assert listed == [f"{row:06d}-0.png" for row in range(6)]
    assert {path.name for path in kept.iterdir()} == {*listed, "pictures.jsonl"}
    # Ranks draw different noise, so no two states have the same reward, except by chance.
    rewards = [{row["reward_target"] for row in rows if row["rank"] == rank} for rank in (0, 1)]
    assert len(rewards[0] & rewards[1]) <= 1
    assert shared_prompts(one, other) == prompts_of_one_process()


def test_gdmd_in_shards_trains_as_one_process(tiny_pipeline):
    zero3, fsdp2 = {"stage": 3, **IN_SHARDS}, "fsdp2"
    cases = {"zero3": {"method": "GDMD", "strategy": zero3}, "fsdp2": {"method": "GDMD", "strategy": fsdp2}}
    adapters = {"fsdp2_adapters": {"method": "DMD", "strategy": fsdp2, "module": LORA}}
    found = run_cases(tiny_pipeline, **cases, **adapters)
    for method, own, names in (("GDMD", {}, cases), ("DMD", LORA, adapters)):
        expected = train_together(lambda method=method, own=own: build(tiny_pipeline, method, **own), UPDATES, **DATA)
        for name in names:
            assert_same_run(found[name], expected)
            if name in cases:
                assert_shards_of(found[name], expected[1])


def test_a_directory_that_rank_0_refuses_ends_both_with_its_reason(fast_fit, tmp_path, monkeypatch):
    theirs = tmp_path / "run" / "metrics.csv"
    theirs.parent.mkdir()
    theirs.write_text("loss,step\n0.5,1\n")
    monkeypatch.chdir(tmp_path)
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    codes, printed = run_ranks(HERE / "command_line.py", "fit", *fast_fit, *two, check=False, timeout=60)
    assert codes == [2, 2]
    for text in printed:
        (line,) = [line for line in text.splitlines() if "error: " in line]
        assert line.startswith(f"gdmd_lightning: error: {theirs.parent}: it has results of another run; remove it")
        assert "Traceback" not in text
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [theirs]
    assert theirs.read_text() == "loss,step\n0.5,1\n"


@pytest.mark.slow
def test_ranks_with_adapters_share_the_work_of_embedding(two_ranks, tmp_path):
    (tmp_path / "prompts.txt").write_text(
        "".join(f"a {c} {s}\n" for c in ("red", "blue") for s in ("circle", "square"))
    )
    lora = ["--model.lora.rank=2", "--model.lora.alpha=4", "--model.memory.gradient_checkpointing=true"]
    cache = [f"--model.embedding_cache.directory={tmp_path / 'cache'}", f"--data.source={tmp_path / 'prompts.txt'}"]
    one, other = two_ranks("--trainer.strategy=ddp", *lora, *cache)
    assert one["updates"] == other["updates"] == UPDATES
    assert one["digests"] == other["digests"]
    assert len(set(one["digests"].values())) == 5, "some roles are equal"
    # Each rank embedded its share, and no prompt was embedded twice.
    from safetensors import safe_open

    embedded = []
    for shard in (tmp_path / "cache").glob("*.safetensors"):
        with safe_open(shard, "pt") as content:
            embedded.append([name for name in content.keys() if name.endswith(".sequence")])  # noqa: SIM118
    assert len(embedded) == 2
    assert len({name for part in embedded for name in part}) == sum(map(len, embedded)) >= 5


@pytest.mark.slow
def test_default_strategy_trains_on_two_ranks_too(two_ranks):
    one, other = two_ranks()
    assert one["digests"] == other["digests"]
    assert shared_prompts(one, other) == prompts_of_one_process()


def shared_prompts(*ranks: dict) -> list[str]:
    """The prompts that the ranks see together, in order: those of one process with twice the batch size, each once."""
    return [
        prompt for batches in zip(*(rank["prompts"] for rank in ranks)) for batch in batches for prompt in batch[::4]
    ]


def prompts_of_one_process() -> list[str]:
    from gdmd_lightning.data.prompt_data import PromptDataModule

    data = PromptDataModule("shapes", batch_size=16, group_size=4, shuffle_buffer=100)
    batches = (batch for _, batch in zip(range(UPDATES), data.train_dataloader()))
    return [prompt.text for batch in batches for prompt in batch.prompts[:: batch.group_size]]


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_with_its_status(run_cli, fast_fit, tmp_path):
    reward = ["--model.reward=stopping.StopIn", "--model.reward.call=1", "--model.reward.rank=1"]
    two = ["--trainer.max_steps=50", "--trainer.devices=2", "--trainer.strategy=ddp", "--model.reward.number=15"]
    done = run_cli("fit", *fast_fit, *reward, *two)
    assert done.returncode == 128 + 15, done.stderr
    interrupted = tmp_path / "run" / "checkpoints" / "interrupted.ckpt"
    assert f"stopped by signal 15 after 1 updates; resume with --ckpt_path {interrupted}\n" in done.stdout
    assert done.stdout.count("stopped by") == 1
    assert "Traceback" not in done.stderr
    from gdmd_lightning.methods.checkpointing import read_checkpoint

    assert read_checkpoint(str(interrupted), in_memory=False)["global_step"] == 1


@pytest.mark.slow
def test_a_signal_to_one_rank_in_an_evaluation_saves_on_both_before_its_end(run_cli, fast_fit, tmp_path):
    def scored(name: str, call: int, number: int, rank: int) -> str:
        options = f"{{name: {name}, call: {call}, number: {number}, rank: {rank}}}"
        return (
            f"{{class_path: RewardScore, init_args: {{reward: {{class_path: stopping.StopIn, init_args: {options}}}}}}}"
        )

    # Each rank has two batches; rank 0 is killed in its second.
    scores = f"[{scored('warned', 1, 15, 1)}, {scored('killed', 2, 9, 0)}]"
    options = f"scores: {scores}, count: 6, batch_size: 2, every_n_updates: 2, columns: 0, score_teacher: false"
    evaluation = f"[{{class_path: GenerationEvaluation, init_args: {{{options}}}}}]"
    two = ["--trainer.max_steps=50", "--trainer.devices=2", "--trainer.strategy=ddp"]
    done = run_cli("fit", *fast_fit, *two, f"--trainer.callbacks={evaluation}")
    assert done.returncode != 0
    from gdmd_lightning.methods.checkpointing import read_checkpoint

    interrupted = tmp_path / "run" / "checkpoints" / "interrupted.ckpt"
    assert read_checkpoint(str(interrupted), in_memory=False)["global_step"] == 2


@pytest.mark.slow
def test_ranks_roll_back_together_by_what_rank_0_sees(two_ranks, tmp_path):
    from gdmd_lightning.methods.checkpointing import read_checkpoint

    scripted = "{class_path: scripted.Scripted, init_args: {figures: [1.0, 0.1, 0.9]}}"
    watch = (
        "{class_path: CollapseWatch, init_args: {falls: [{figure: held_out, by: 0.5, patience: 1}], "
        "every_n_updates: 1, policy: roll_back, roll_back: {learning_rate_factor: 0.5}}}"
    )
    best = "{monitor: held_out, mode: max, every_n_train_steps: 1, save_last: true}"
    keeper = f"{{class_path: ModelCheckpoint, init_args: {best}}}"
    mine = f"{{class_path: digest.Digest, init_args: {{directory: {tmp_path}}}}}"
    overlay = tmp_path / "watch.yaml"
    overlay.write_text(f"trainer: {{callbacks: [{scripted}, {keeper}, {watch}, {mine}]}}\n")
    one, other = two_ranks("--trainer.strategy=ddp", "--config", str(overlay))
    # Updates 1 and 2, back to 1, the best one, then 2 and 3.
    assert [len(rank["prompts"]) for rank in (one, other)] == [4, 4]
    assert one["updates"] == other["updates"] == 3
    assert one["digests"] == other["digests"]
    last = read_checkpoint(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    (state,) = [each for key, each in last["callbacks"].items() if key.startswith("CollapseWatch")]
    assert state["rolled_back"] == 1
