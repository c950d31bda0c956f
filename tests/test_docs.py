"""What the documentation shows exists and runs."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import tiny
import torch
import yaml

from gdmd_lightning.cli import COMMANDS, main
from gdmd_lightning.configuration.training import parse
from gdmd_lightning.locations import shipped_configs
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.provenance import read_provenance
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.studies.arms import Arm

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} points to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_configs_and_targets_exist(page):
    text = page.read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z][a-z-]*)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for command in re.findall(r"python -m gdmd_lightning ([a-z]+)", text):
        assert command in COMMANDS
    for config in re.findall(r"--config ([\w./]+\.yaml)", text):
        shown = f"```yaml\n# {config}\n" in text
        assert shown or (shipped_configs() / config).is_file(), config
    for path in re.findall(r"`((?:src|tests|benchmarks|notebooks|configs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_makefile_targets_parse():
    for target in ("venv", "demo", "test", "lint", "docs", "clean", "results-shapes"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


METHOD = ROOT / "docs" / "write_a_method.md"


def example(page, name):
    (code,) = [block for block in blocks(page, "python") if f"class {name}" in block]
    space: dict = {}
    exec(code, space)
    return space[name]


def test_contributing_reward_scores():
    reward = example(ROOT / "CONTRIBUTING.md", "Darkness")()
    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert reward.score(pictures, [Prompt(""), Prompt("")]).tolist() == [1, 0]


def test_method_of_the_page_steps_its_generator_in_every_second_update(tiny_pipeline):
    module = tiny.module(tiny_pipeline, example(METHOD, "AlternatingDMD"))
    module.configure_model()
    weights = {0: copied(module)}

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            weights[module.updates] = copied(module)

    trainer = tiny.train(module, 3, callbacks=[Watch()])
    assert trainer.global_step == 3
    moved = [
        {role for role in before if tiny.differing(before[role], after[role])}
        for before, after in zip(list(weights.values())[:-1], list(weights.values())[1:], strict=True)
    ]
    assert moved == [{"generator", "fake_score"}, {"fake_score"}, {"generator", "fake_score"}]


def test_method_page_trains_and_compares_as_written(tiny_pipeline, tmp_path, monkeypatch):
    (code,), (config, comparison), (command,) = (blocks(METHOD, kind) for kind in ("python", "yaml", "bash"))
    (tmp_path / "my_methods.py").write_text(code)
    (tmp_path / "alternating.yaml").write_text(config)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    small = [f"--model.family.path={tiny_pipeline}", "--data.batch_size=4", "--data.group_size=2",
             "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.save_last=true"]  # fmt: skip
    python, flag, package, *arguments = shlex.split(command)
    assert (python, flag, package) == ("python", "-m", "gdmd_lightning")
    main([*arguments, *small])
    arms = {name: Arm(**arm) for name, arm in yaml.safe_load(comparison)["methods"].items()}
    assert parse(arms["mine"].arguments).model.class_path == "my_methods.AlternatingDMD"
    sys.modules.pop("my_methods", None)
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    assert read_checkpoint(str(checkpoint))["global_step"] == 4


def test_own_teacher_page_trains_as_written(tiny_pipeline, tmp_path, monkeypatch):
    page = ROOT / "docs" / "own_teacher.md"
    (prompts,), (reward, _), (config,), (command,) = (blocks(page, kind) for kind in ("json", "python", "yaml", "bash"))
    (tmp_path / "prompts.jsonl").write_text(prompts)
    (tmp_path / "my_reward.py").write_text(reward)
    (tmp_path / "mine.yaml").write_text(config)
    shutil.copytree(tiny_pipeline, tmp_path / "my_pipeline")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    # The tiny pipeline makes small pictures and has no third text encoder; a test has no GPU and little time.
    small = ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.devices=1", "--model.height=32",
             "--model.width=32", "--model.family.max_sequence_length=0", "--trainer.callbacks.columns=0"]  # fmt: skip
    python, flag, package, *arguments = shlex.split(command.replace("\\\n", " "))
    assert (python, flag, package) == ("python", "-m", "gdmd_lightning")
    main([*arguments, *small])
    sys.modules.pop("my_reward", None)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    found = read_provenance(read_checkpoint(str(checkpoint)))
    assert found.reward == "wanted_brightness"
    assert -1 < found.scores["wanted_brightness/overall"] < 0


def test_own_teacher_page_makes_a_loader_of_prompt_batches():
    _, code = blocks(ROOT / "docs" / "own_teacher.md", "python")
    made = {}
    exec(code, made)
    (batch,) = made["loader"]
    assert batch.groups.tolist() == [0] * 4 + [1] * 4
    assert batch.prompts[0] == batch.prompts[3] != batch.prompts[4]


def test_watching_page_parses_and_watches_figures_that_are_logged(tmp_path):
    (config,) = blocks(ROOT / "docs" / "watching.md", "yaml")
    (tmp_path / "watched.yaml").write_text(config)
    parse(["--config", "shapes.yaml", "--config", str(tmp_path / "watched.yaml")])
    watch = yaml.safe_load(config)["trainer"]["callbacks"][-1]["init_args"]
    names = [rule["figure"] for rule in (*watch["falls"], *watch["rises"])]
    logged = (ROOT / "docs" / "logs.md").read_text(encoding="utf-8")
    trained = [name.replace("/generator", "/<role>") for name in names if name.startswith("train/")]
    assert len(trained) == 2
    assert all(f"| `{name}` |" in logged for name in trained)


def test_evaluation_page_keeps_the_best_checkpoint_next_to_the_last(fast_fit, tmp_path):
    (config,) = [block for block in blocks(ROOT / "docs" / "evaluation.md", "yaml") if "ModelCheckpoint" in block]
    (tmp_path / "best.yaml").write_text(config)
    with_it = ["--config", str(tmp_path / "best.yaml")]
    (keeper, evaluation) = parse([*fast_fit, *with_it]).trainer.callbacks
    assert keeper.init_args.every_n_train_steps == evaluation.init_args.every_n_updates == 100
    (tmp_path / "best.yaml").write_text(config.replace("100", "1"))
    small = {"count": 6, "columns": 0, "score_teacher": False}
    main(["fit", *fast_fit, *with_it, *(f"--trainer.callbacks.{name}={value}" for name, value in small.items())])
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert "last.ckpt" in kept
    assert len(kept) == 2


def copied(module):
    """The weights of the trained roles."""
    return {role: [p.detach().clone() for p in module.roles.parameters_of(role)] for role in module.roles.trained}
