"""Runs that start on merged adapters: an earlier run's adapters, frozen, under new ones."""

import pytest
import tiny
import torch

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.restore import load_module
from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.errors import UserError
from gdmd_lightning.latents import NoisyLatents
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.gdmd import GDMD
from gdmd_lightning.planning.footprint import plan
from gdmd_lightning.roles import LoRA, Optimization

FIRST = LoRA(rank=2, alpha=4)
# Fewer layers than the first one has, and one that it has not.
SECOND = LoRA(rank=3, alpha=6, targets=("to_q", "proj_out"), start="merged")
FAST = {
    "generator": Optimization(learning_rate=0.01),
    "fake_score": Optimization(learning_rate=0.01),
    "ema_decay": 0.5,
}
ROLES = ("teacher", "generator", "ema", "fake_score", "old")
TEXTS = ["a red circle", "two blue squares"]


@pytest.fixture(scope="module")
def first(tiny_pipeline, tmp_path_factory):
    """Module and checkpoint of two updates of DMD with adapters, which are far from their start."""
    path = tmp_path_factory.mktemp("first") / "first.ckpt"
    module = tiny.module(tiny_pipeline, DMD, lora=FIRST, **FAST)
    tiny.train(module, 2).save_checkpoint(path)
    return module, str(path)


@pytest.fixture(scope="module")
def second(tiny_pipeline, first, tmp_path_factory):
    """Module and checkpoint of two updates of GDMD on top of the first one's adapters."""
    path = tmp_path_factory.mktemp("second") / "second.ckpt"
    module = tiny.module(tiny_pipeline, GDMD, lora=SECOND, start_from=first[1], **FAST)
    tiny.train(module, 2).save_checkpoint(path)
    return module, str(path)


def started(pipeline, path, method=GDMD, lora=SECOND, **options):
    module = tiny.module(pipeline, method, lora=lora, start_from=path, **options)
    module.configure_model()
    return module


def answer(module, role, **options):
    x = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(3))
    latents = NoisyLatents(x, torch.tensor([0.8, 0.3]), module.embeddings(TEXTS))
    with torch.no_grad():
        return module.roles.velocity(role, latents, **options)


def test_merged_start_equals_the_average_of_each_trained_role(tiny_pipeline, first):
    module = started(tiny_pipeline, first[1])
    sources = {"teacher": "teacher", "generator": "ema", "ema": "ema", "old": "ema", "fake_score": "fake_score"}
    for role, source in sources.items():
        torch.testing.assert_close(answer(module, role), answer(first[0], source), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answer(module, "generator"), answer(first[0], "generator"), atol=1e-4)
    assert not torch.allclose(answer(module, "fake_score"), answer(module, "teacher"), atol=1e-4)


def test_merged_start_trains_new_adapters_only(tiny_pipeline, first, second):
    before, after = started(tiny_pipeline, first[1]).state_dict(), second[0].state_dict()
    assert before.keys() == after.keys()
    frozen = {name for name in before if "@start" in name}
    assert {name.split(".")[-2] for name in frozen} == {"generator@start", "fake_score@start"}
    assert not any(p.requires_grad for name, p in second[0].named_parameters() if "@start" in name)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not changed & frozen
    assert {name.split(".")[-2] for name in changed} == {"generator", "ema", "old", "fake_score"}


def test_merged_run_resumes_to_the_bit_without_its_start(tiny_pipeline, first, second, tmp_path):
    whole = tiny.module(tiny_pipeline, GDMD, lora=SECOND, start_from=first[1], **FAST)
    tiny.train(whole, 3).save_checkpoint(tmp_path / "whole.ckpt")
    resumed = tiny.module(tiny_pipeline, GDMD, lora=SECOND, **FAST)
    trainer = tiny.trainer(3)
    data = tiny.PromptDataModule("shapes", batch_size=8, group_size=4)
    trainer.fit(resumed, datamodule=data, ckpt_path=second[1])
    trainer.save_checkpoint(tmp_path / "resumed.ckpt")
    one, other = (read_checkpoint(str(tmp_path / f"{name}.ckpt")) for name in ("whole", "resumed"))
    for part in ("state_dict", "optimizer_states"):
        assert tiny.differing(one[part], other[part]) == [], part


@pytest.mark.parametrize("role", ["generator", "ema", "fake_score"])
def test_merged_role_is_exported_with_what_it_is_on_top_of(second, role):
    module = second[0]
    x = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        network, embeddings = module.roles.standalone(role), module.embeddings(TEXTS)
        found = module.family.predict_velocity(network, x, torch.tensor([0.8, 0.3]), embeddings, 1.0)
    torch.testing.assert_close(found, answer(module, role), atol=1e-5, rtol=1e-5)


def test_merged_adapter_is_exported_as_one(tiny_pipeline, second, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    module = second[0]
    module.roles.write_adapter("ema", tmp_path / "lora")
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_pipeline, **module.family.loading_arguments())
    pipe.load_lora_weights(tmp_path / "lora")
    x = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        levels, embeddings = torch.tensor([0.8, 0.3]), module.embeddings(TEXTS)
        found = module.family.predict_velocity(pipe.transformer, x, levels, embeddings, 1.0)
    torch.testing.assert_close(found, answer(module, "ema"), atol=1e-5, rtol=1e-5)


def test_merged_run_can_be_merged_again(tiny_pipeline, second):
    module = started(tiny_pipeline, second[1], lora=LoRA(rank=1, alpha=1, start="merged"))
    torch.testing.assert_close(answer(module, "generator"), answer(second[0], "ema"), atol=1e-5, rtol=1e-5)
    ranks = {len(p) for name, p in module.named_parameters() if ".lora_A.generator@start." in name}
    assert ranks == {FIRST.rank + SECOND.rank}


def test_adapter_scale_applies_to_merged_adapters_too(second):
    module = second[0]
    before = answer(module, "generator")
    assert torch.equal(answer(module, "generator", adapter_scale=0.0), answer(module, "teacher"))
    assert torch.equal(answer(module, "generator"), before)


def test_merged_start_continues_heads(tiny_pipeline, tmp_path):
    module = tiny.module(tiny_pipeline, DMD2, images=ShapesImages(), lora=FIRST)
    tiny.train(module, 1).save_checkpoint(tmp_path / "dmd2.ckpt")
    again = started(tiny_pipeline, str(tmp_path / "dmd2.ckpt"), DMD2, images=ShapesImages())
    names = [name for name in module.state_dict() if ".discriminator." in name]
    assert names
    assert all(torch.equal(module.state_dict()[name], again.state_dict()[name]) for name in names)


def test_plan_counts_merged_adapters(tiny_pipeline, first):
    def sizes(lora):
        found = plan(tiny.module(tiny_pipeline, DMD, lora=lora, start_from=first[1]), 4)
        return {component.name: component.size for component in found.components}

    merged, plain = sizes(SECOND), sizes(LoRA(rank=3, alpha=6, targets=("to_q", "proj_out")))
    own = sum(
        4 * p.numel() for name, p in started(tiny_pipeline, first[1], DMD).named_parameters() if "@start." in name
    )
    assert sum(merged.values()) - sum(plain.values()) == own


def test_merged_checkpoint_restores_from_the_command_line(fast_fit, tmp_path):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    training.run([*fast_fit, "--model.lora.rank=2", "--trainer.max_steps=1"])
    start = last.parents[1].rename(tmp_path / "first") / "checkpoints" / "last.ckpt"
    merged = ["--model.lora.rank=4", "--model.lora.start=merged"]
    cli = training.run([*fast_fit, *merged, f"--model.start_from={start}", "--trainer.max_steps=1"])
    start.unlink()
    for role in ("ema", None):
        module = load_module(str(last), role=role, trust=["tiny"])
        noise = torch.randn(2, *module.latent_shape, generator=torch.Generator().manual_seed(5))
        assert torch.equal(module.generate(noise, TEXTS), cli.model.generate(noise, TEXTS))


def test_merging_needs_adapters_and_their_scale(tiny_pipeline, first, second, tmp_path):
    with pytest.raises(UserError, match=r"model\.lora\.start: it is merged, but no checkpoint is given"):
        tiny.train(tiny.module(tiny_pipeline, DMD, lora=SECOND), 1)
    full = tmp_path / "full.ckpt"
    tiny.train(tiny.module(tiny_pipeline, DMD), 1).save_checkpoint(full)
    with pytest.raises(UserError, match="it has no adapters to merge, or does not record their scale"):
        started(tiny_pipeline, str(full))
    with pytest.raises(UserError, match=r"trained with .*model\.lora\.start 'merged' \(now None\)"):
        started(tiny_pipeline, second[1], lora=LoRA(3, 6, ("to_q", "proj_out")))


def test_merging_needs_an_adapter_of_the_generator(tiny_pipeline, first, tmp_path):
    content = read_checkpoint(first[1])
    content["state_dict"] = {name: w for name, w in content["state_dict"].items() if ".fake_score." in name}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="its generator is not this model's"):
        started(tiny_pipeline, str(tmp_path / "other.ckpt"))
