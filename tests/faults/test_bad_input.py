"""Every mistake gives one line with its place, a nonzero status, and no incomplete output."""

import json
import shutil
from pathlib import Path

import bad_rewards
import pytest
import torch
from safetensors.torch import load_file, save_file

from gdmd_lightning.cli import main
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import checked_score

PREFIX = "gdmd_lightning: error: "


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# Configurations: the message names the key, the value, and the right form.


def test_fit_unknown_config_lists_the_shipped_ones(complaint):
    missing = "--config: no configuration "
    assert complaint("fit", "--config", "shapse.yaml") == f"{missing}'shapse.yaml'; did you mean 'shapes.yaml'?"
    line = complaint("fit", "--config", "nothing.here")
    assert line.startswith(f"{missing}'nothing.here'; give a path, or one of: cold_start.yaml, ")
    assert " shapes_dmd.yaml, " in line


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("trainer: {max_steps: 3\nmodel: [\n", "broken.yaml: not a readable YAML file: "),
        (b"trainer: caf\xe9\n", "broken.yaml: not a readable YAML file: "),
        ("- a\n- b\n", "broken.yaml: the file has no keys; "),
        ("", "broken.yaml: the file has no keys; "),
        (
            "trainer:\n  max_steps: 3\n  callbacks:\n  - class_path: x\n    init_args: {a: 1, a: 2}\n",
            "broken.yaml: the key 'a' stands there twice, again in line 5; keep one",
        ),
        (
            "trainer: {max_steps: 3}\ndata: {}\ntrainer: {max_steps: 4}\n",
            "the key 'trainer' stands there twice",
        ),
        ("trainer: {max_stepps: 3}\n", "fit: unknown key 'trainer.max_stepps'; did you mean 'trainer.max_steps'? "),
        (
            "model: {init_args: {lambda_polciy: 3}}\n",
            "fit: unknown key 'model.lambda_polciy'; did you mean 'model.lambda_policy'? ",
        ),
        ("data: {batch_size: '${nowhere}'}\n", "data.batch_size: '${nowhere}' refers to a key that is not there; "),
    ],
)
def test_fit_names_a_broken_config_or_its_key(complaint, fast_fit, tmp_path, content, expected):
    assert expected in complaint("fit", *fast_fit, "--config", written(tmp_path / "broken.yaml", content))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--trainer.max_stepps", "3"],
            "fit: unknown option '--trainer.max_stepps'; did you mean 'trainer.max_steps'? ",
        ),
        (["--model.lambda_polciy", "3"], "fit: unknown key 'model.lambda_polciy'; "),
        (["--model.policy.bta", "3"], "fit: unknown option '--model.policy.bta'; did you mean 'model.policy.beta'? "),
        (["--trainer.max_steps", "three"], "trainer.max_steps: expected int, got 'three'; "),
        (["--model.lambda_policy", "high"], "model.lambda_policy: expected float, got 'high'; "),
        (["--model.policy.form", "half"], "model.policy.form: expected one of 'full', 'weighted', got 'half'; "),
        (["--model.targets.size", "four"], "model.targets.size: expected int, got 'four'; "),
        (["--trainer.precision", "7"], "trainer.precision: expected one of 64, 32, 16 or "),
        (["--model", "GDDM"], "model: unknown class 'GDDM'; "),
        (["--model.reward", "NoReward"], "model.reward: unknown class 'NoReward'; "),
        (
            ["--model.reward.class_path", "no.such.Reward"],
            "model.reward: there is no module 'no' for 'no.such.Reward'; ",
        ),
        (["--trainer.callbacks+=Nope"], "trainer.callbacks: unknown class 'Nope'; "),
        (["--trainer.strategy", "dpd"], "trainer.strategy: unknown strategy 'dpd'; did you mean 'ddp'?"),
        (
            ["--trainer.gradient_clip_val", "1"],
            "trainer.gradient_clip_val: not supported: each role ",
        ),
        pytest.param(
            ["--trainer.accumulate_grad_batches", "4"],
            "trainer.accumulate_grad_batches: it is 4, but an update takes several optimizer steps; "
            "use model.accumulate 4, or data.batch_size 32 with model.micro_batch_size 8: the same update",
            marks=pytest.mark.slow,
        ),
        (
            ["--trainer.accumulate_grad_batches", "2", "--data.global_batch_size", "8"],
            "steps; use data.global_batch_size 16: a rank has 8 of them in memory at once",
        ),
        (["--model.accumulate", "0"], "model.accumulate: it is 0; use an integer of at least 1"),
        pytest.param(["--model.non_finite.limit", "0"], "model.non_finite.limit: it is 0", marks=pytest.mark.slow),
        (["--model.non_finite.policy", "ignore"], "expected one of 'stop', 'skip', got 'ignore'"),
        (["--model.generator.schedule", "exponential"], "expected one of 'constant', 'linear', 'cosine', got 'expo"),
        (
            ["--model.fake_score.schedule=cosine", "--trainer.max_steps=-1", "--trainer.max_epochs=-1"],
            "model.fake_score.schedule: a cosine schedule ends at trainer.max_steps, which is -1; ",
        ),
        (["--trainer.accelerator", "tpu"], "fit: Requirement 'torch_xla"),
        (["--trainer.callbacks+=TQDMProgressBar"], "`enable_progress_bar=False` but found `TQDMProgressBar`"),
        pytest.param(["--model.steps", "0"], "model.steps: it is 0", marks=pytest.mark.slow),
        pytest.param(
            ["--model.policy.beta", "0"], "model.policy.beta: it is 0.0; use a number above 0", marks=pytest.mark.slow
        ),
        pytest.param(
            ["--model.family.init_args.dtype", "float31"],
            "family.dtype: unknown dtype 'float31'; ",
            marks=pytest.mark.slow,
        ),
        pytest.param(["--model.height", "33"], "resolution: 33x32 is not a multiple of ", marks=pytest.mark.slow),
    ],
)
def test_fit_names_key_and_value_of_a_wrong_argument(complaint, fast_fit, arguments, expected):
    assert expected in complaint("fit", *fast_fit, *arguments)


def test_fit_reports_a_missing_model(complaint):
    assert "fit: missing: model; give --config shapes.yaml" in complaint("fit")


# Pipelines.


@pytest.fixture
def pipeline(tiny_pipeline, tmp_path) -> Path:
    """A copy of the tiny pipeline that a test may damage."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


def on(pipeline: Path) -> list[str]:
    return ["--model.family.init_args.path", str(pipeline)]


def test_fit_reports_a_missing_pipeline_directory(complaint, fast_fit):
    line = complaint("fit", *fast_fit, *on(Path("/nowhere/pipeline")))
    assert line.startswith("family.path: no directory '/nowhere/pipeline'; ")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without(path: Path, name: str) -> None:
    """Remove a weight from a file, next to which a variant is whole."""
    weights = load_file(path)
    save_file(weights, path.with_suffix(".fp16.safetensors"), {"format": "pt"})
    del weights[name]
    save_file(weights, path, {"format": "pt"})


def adapted(path: Path) -> None:
    """Save a network with LoRA attached."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    network = SD3Transformer2DModel.from_pretrained(path)
    network.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    network.save_pretrained(path)


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


DAMAGES = (
    (lambda p: truncated(p / "transformer/diffusion_pytorch_model.safetensors"), "cannot be loaded"),
    (lambda p: truncated(p / "vae/diffusion_pytorch_model.safetensors"), "cannot be loaded"),
    (lambda p: truncated(p / "text_encoder/model.safetensors"), "cannot be loaded"),
    (lambda p: (p / "text_encoder_2/model.safetensors").unlink(), "cannot be loaded"),
    (lambda p: (p / "tokenizer/tokenizer.json").write_text("{"), "cannot be loaded"),
    (lambda p: (p / "transformer/config.json").write_text("{"), "cannot be loaded"),
    (lambda p: edited(p / "transformer/config.json", num_layers=2), "cannot be loaded"),
    (lambda p: edited(p / "transformer/config.json", num_attention_heads=2), "cannot be loaded"),
    (lambda p: edited(p / "text_encoder/config.json", num_hidden_layers=4), "cannot be loaded"),
    (
        lambda p: without(p / "text_encoder/model.safetensors", "text_model.encoder.layers.0.mlp.fc1.weight"),
        "lacks 1 of its 53 weights, such as 'text_model.encoder.layers.0.mlp.fc1.weight'; save or download it again",
    ),
    (
        lambda p: without(p / "transformer/diffusion_pytorch_model.safetensors", "proj_out.weight"),
        "weights, such as 'proj_out.weight'; save or download it again",
    ),
    (lambda p: adapted(p / "transformer"), "/transformer' was saved with LoRA attached; call fuse_lora(), to keep"),
    (lambda p: shutil.rmtree(p / "transformer"), "lacks its component 'transformer'"),
    (lambda p: shutil.rmtree(p / "tokenizer_2"), "lacks its component 'tokenizer_2'"),
    (lambda p: edited(p / "model_index.json", _class_name="FluxPipeline"), "holds a FluxPipeline, not a "),
    (lambda p: (p / "model_index.json").write_text("{"), "model_index.json is not JSON"),
    (lambda p: (p / "model_index.json").write_text("[]"), "holds a None, not a "),
    (lambda p: (p / "model_index.json").unlink(), "has no readable model_index.json"),
)


def reported(line: str, pipeline: Path, expected: str) -> bool:
    return line.startswith("family.path: ") and expected in line and str(pipeline) in line


@pytest.mark.parametrize(("damage", "expected"), DAMAGES)
def test_corrupt_pipeline_is_reported_with_its_path(pipeline, damage, expected):
    import tiny

    damage(pipeline)
    with pytest.raises(UserError) as refused:
        tiny.module(pipeline).configure_model()
    assert reported(str(refused.value), pipeline, expected)


@pytest.mark.parametrize(
    ("damage", "expected"), [DAMAGES[0], *(pytest.param(*each, marks=pytest.mark.slow) for each in DAMAGES[1:])]
)
def test_fit_reports_a_corrupt_pipeline_with_its_path(complaint, fast_fit, pipeline, damage, expected):
    damage(pipeline)
    assert reported(complaint("fit", *fast_fit, *on(pipeline)), pipeline, expected)


# Prompts.


# data/test_readers.py reads such files without fit.
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("p.txt", "", "p.txt: there is no prompt in it"),
        pytest.param("p.txt", "\n  \n", "p.txt: there is no prompt in it", marks=pytest.mark.slow),
        pytest.param(
            "p.txt", b"a circle\n" + "a caf\xe9\n".encode("latin-1"), "p.txt:2: not UTF-8", marks=pytest.mark.slow
        ),
        ("p.jsonl", '{"prompt": "a circle"}\n{"text": "a"}\n', "p.jsonl:2: no column 'prompt'; it has 'text'"),
        pytest.param(
            "p.jsonl", '{"prompt": "a circle"}\n{"prompt": \n', "p.jsonl:2: broken JSON", marks=pytest.mark.slow
        ),
        pytest.param("p.csv", "text\na circle\n", "p.csv:1: no column 'prompt'", marks=pytest.mark.slow),
        pytest.param("p.parquet", "not parquet", "p.parquet: not a readable parquet file", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_fit_reports_bad_prompts_with_file_and_line(complaint, fast_fit, tmp_path, name, content, expected, workers):
    source = written(tmp_path / name, content)
    assert expected in complaint("fit", *fast_fit, "--data.source", source, "--data.num_workers", workers)


@pytest.mark.slow
def test_fit_reports_a_missing_prompt_file(complaint, fast_fit):
    assert complaint("fit", *fast_fit, "--data.source", "prompts.txt").startswith("prompts.txt: no such file")


def test_fit_reports_a_group_size_that_does_not_divide_the_batch(complaint, fast_fit):
    line = complaint("fit", *fast_fit, "--data.batch_size", 8, "--data.group_size", 3)
    assert line.startswith("data.group_size: group_size 3 does not divide batch_size 8; ")


def test_fit_reports_prompts_without_the_metadata_that_the_reward_needs(complaint, fast_fit, tmp_path):
    source = written(tmp_path / "p.txt", "a red circle\n")
    assert "'a red circle'" in complaint("fit", *fast_fit, "--data.source", source, "--model.reward", "ShapesReward")


# Rewards.


BAD_REWARDS = {
    "NotANumber": "reward 'not_a_number': returned nan for 1 of 16 pictures, the first with prompt ",
    "WrongShape": "reward 'wrong_shape': returned (16, 1) for 16 pictures; return a tensor of shape (16,)",
    "NoTensor": "reward 'no_tensor': returned list for 16 pictures",
    "Raising": "reward 'raising': raised KeyError: 'no such",
    "Unfinished": "abstract",
}
FAST = ("NotANumber", "Unfinished")


@pytest.mark.parametrize("name", [name for name in BAD_REWARDS if name != "Unfinished"])
def test_bad_reward_is_named(name):
    prompts = [Prompt(f"prompt {i}") for i in range(16)]
    with pytest.raises(UserError) as refused:
        checked_score(getattr(bad_rewards, name)(), torch.zeros(16, 3, 8, 8), prompts)
    assert BAD_REWARDS[name] in str(refused.value)


@pytest.mark.parametrize(
    "name", [each if each in FAST else pytest.param(each, marks=pytest.mark.slow) for each in BAD_REWARDS]
)
def test_fit_names_a_bad_reward(complaint, fast_fit, name):
    assert BAD_REWARDS[name] in complaint("fit", *fast_fit, "--model.reward", f"bad_rewards.{name}")


# Checkpoints.


@pytest.fixture
def checkpoint(recorded_run) -> Path:
    return recorded_run / "checkpoints" / "last.ckpt"


def test_fit_and_export_report_a_missing_checkpoint(complaint, fast_fit, tmp_path):
    for arguments in (["fit", *fast_fit, "--ckpt_path", "no.ckpt"], ["export", "no.ckpt", "out"]):
        assert complaint(*arguments).startswith("checkpoint: no checkpoint 'no.ckpt'; ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [*(pytest.param(c, marks=pytest.mark.slow) for c in (b"", b"garbage")), b"PK\x03\x04 and garbage"]
)
def test_fit_and_export_report_a_file_that_is_not_a_checkpoint(complaint, fast_fit, tmp_path, content):
    path = written(tmp_path / "bad.ckpt", content)
    for arguments in (["fit", *fast_fit, "--ckpt_path", path], ["export", path, "out"]):
        assert complaint(*arguments).startswith(f"checkpoint: '{path}' is not a readable checkpoint: ")
    line = complaint("fit", *fast_fit, "--model.start_from", path)
    assert f"'{path}' is not a readable checkpoint: " in line


def test_fit_reports_a_truncated_checkpoint(complaint, fast_fit, checkpoint, tmp_path):
    path = written(tmp_path / "half.ckpt", checkpoint.read_bytes()[: checkpoint.stat().st_size // 2])
    assert "half.ckpt' is not a readable checkpoint: " in complaint("fit", *fast_fit, "--ckpt_path", path)
    path.unlink()


@pytest.mark.parametrize("where", [0.3, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.6, 0.9))])
def test_fit_and_export_notice_a_flipped_byte_in_a_checkpoint(complaint, fast_fit, checkpoint, tmp_path, where):
    content = bytearray(checkpoint.read_bytes())
    content[int(where * len(content))] ^= 1
    path = written(tmp_path / "flipped.ckpt", bytes(content))
    assert "flipped.ckpt' is damaged: the checksum of '" in complaint("export", path, "out")
    if where == 0.3:
        assert "flipped.ckpt' is damaged: " in complaint("fit", *fast_fit, "--ckpt_path", path)
        assert "flipped.ckpt' is damaged: " in complaint("fit", *fast_fit, "--model.start_from", path)
    path.unlink()


class Sneaky:
    def __reduce__(self):
        return (Path.touch, (Path("sneaked"),))


def test_fit_refuses_a_checkpoint_that_would_run_code(complaint, fast_fit, tmp_path):
    torch.save({"state_dict": Sneaky()}, tmp_path / "sneaky.ckpt")
    line = complaint("fit", *fast_fit, "--ckpt_path", tmp_path / "sneaky.ckpt")
    assert "is not a readable checkpoint" in line
    assert not (tmp_path / "sneaked").exists()


def test_fit_reports_a_file_of_plain_weights(complaint, fast_fit, tmp_path):
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.ckpt")
    assert "is not a Lightning checkpoint" in complaint("fit", *fast_fit, "--ckpt_path", tmp_path / "weights.ckpt")


# methods/test_checkpointing.py starts from a checkpoint of another network without fit.
@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("ckpt_path", "it is of another model"),
        pytest.param("model.start_from", "is not this model's", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("size", [pytest.param({"layers": 2}, marks=pytest.mark.slow), {"heads": 2}])
def test_fit_reports_a_checkpoint_of_another_network(complaint, fast_fit, checkpoint, tmp_path, size, key, expected):
    import tiny

    other = tiny.save_pipeline(tmp_path / "other", **size)
    line = complaint("fit", *fast_fit, *on(other), f"--{key}", checkpoint)
    assert expected in line
    assert "checkpoint" in line or str(checkpoint) in line


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--config", "shapes_dmd.yaml"], marks=pytest.mark.slow),
        ["--model.policy.form=weighted"],
    ],
)
def test_fit_reports_a_checkpoint_of_another_method(complaint, fast_fit, checkpoint, tmp_path, arguments):
    line = complaint("fit", *fast_fit, *arguments, "--ckpt_path", checkpoint)
    assert "it is of another model: this model has no roles.old." in line


def test_fit_reports_a_checkpoint_with_another_batch_size(complaint, fast_fit, checkpoint):
    line = complaint("fit", *fast_fit, "--data.batch_size", 16, "--ckpt_path", checkpoint)
    assert "with 8 samples of an update on all ranks (now 16); set data.global_batch_size 8, or start" in line


# Export.


def test_export_refuses_a_directory_that_exists(complaint, checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    assert complaint("export", checkpoint, "out").startswith("export: 'out' exists; ")
    assert not list((tmp_path / "out").iterdir())


def test_every_command_reports_an_unknown_option(complaint):
    for command in ("demo", "evaluate", "export", "plan", "pretrain", "compare", "sample"):
        assert complaint(command, "--no_such_option", "1").startswith(f"{command}: ")


# As a separate process.


@pytest.mark.slow
def test_fit_as_a_process_prints_one_line(run_cli, fast_fit):
    plain = run_cli("fit", *fast_fit, "--model.reward", "bad_rewards.NotANumber")
    assert plain.returncode == 2
    lines = [line for line in plain.stderr.splitlines() if line.startswith(PREFIX)]
    assert len(lines) == 1
    assert "Traceback" not in plain.stderr


def test_debug_raises_an_error_before_training_with_its_traceback():
    with pytest.raises(UserError, match=r"no configuration 'nothing\.yaml'"):
        main(["fit", "--config", "nothing.yaml", "--debug"])


@pytest.mark.slow
def test_debug_raises_the_error_with_its_traceback(fast_fit):
    with pytest.raises(UserError, match=r"reward 'not_a_number': returned nan for 1 of 16 pictures"):
        main(["fit", *fast_fit, "--model.reward", "bad_rewards.NotANumber", "--debug"])


@pytest.mark.slow
def test_fit_as_a_process_prints_only_one_line_for_an_unknown_config(run_cli):
    done = run_cli("fit", "--config", "nothing.yaml")
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith(PREFIX)
    assert done.stderr.count("\n") == 1
