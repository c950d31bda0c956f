"""What the documentation shows exists and runs."""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from gdmd_lightning.cli import COMMANDS
from gdmd_lightning.locations import shipped_configs
from gdmd_lightning.prompts import Prompt, PromptBatch

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_are_there(page):
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
        assert (shipped_configs() / config).is_file(), config
    for path in re.findall(r"`((?:src|tests|benchmarks|notebooks|configs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_makefile_targets_are_understood_by_make():
    for target in ("venv", "demo", "test", "lint", "docs", "clean", "results-shapes"):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def example(name):
    (code,) = [block for block in blocks(ROOT / "CONTRIBUTING.md", "python") if f"class {name}" in block]
    space: dict = {}
    exec(code, space)
    return space[name]


def test_the_example_reward_scores():
    reward = example("Darkness")()
    pictures = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])
    assert reward.score(pictures, [Prompt(""), Prompt("")]).tolist() == [1, 0]


def test_the_example_method_trains(tiny_pipeline):
    import lightning.pytorch as pl

    from gdmd_lightning.families.sd3 import SD3Family
    from gdmd_lightning.shapes.captions import evaluation_prompts

    method = example("HighNoiseDMD")
    module = method(SD3Family(str(tiny_pipeline), max_sequence_length=0), height=32, width=32)
    batch = PromptBatch(tuple(evaluation_prompts(2)), 1)
    before = None

    class Loader:
        def __iter__(self):
            while True:
                yield batch

    module.transfer_batch_to_device = lambda batch, device, index: batch  # type: ignore[method-assign]
    module.configure_model()
    before = [p.clone() for p in module.networks.generator.parameters()]
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, Loader())
    assert trainer.global_step == 2
    assert any(not torch.equal(a, b) for a, b in zip(before, module.networks.generator.parameters(), strict=True))
