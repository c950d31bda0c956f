"""Modules restored from checkpoints."""

import pytest
import tiny
import torch

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.restore import load_module, picture_size
from gdmd_lightning.data.images import ShapesImages
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.dmd import DMD
from gdmd_lightning.methods.dmd2 import DMD2
from gdmd_lightning.methods.nft import DiffusionNFT
from gdmd_lightning.roles import LoRA, Optimization
from gdmd_lightning.samplers import Renoise
from gdmd_lightning.schedules import LogitNormal

TEXTS = ["a red circle", "two blue squares left of a green triangle"]


def latent_noise() -> torch.Tensor:
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


def test_load_module_restores_the_module_that_was_trained(fast_fit, tmp_path):
    noise = latent_noise()
    cli = training.run([*fast_fit, "--model.lambda_policy=0.5", "--model.sampler=Renoise", "--trainer.max_steps=1"])
    module = load_module(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), trust=["tiny"])
    assert type(module) is type(cli.model)
    assert (module.lambda_policy, module.sampler, module.policy) == (0.5, cli.model.sampler, cli.model.policy)
    assert type(module.judge.reward).__name__ == "Brightness"
    assert torch.equal(module.generate(noise, TEXTS), cli.model.generate(noise, TEXTS))


def test_load_module_does_not_need_the_checkpoint_that_a_run_started_from(fast_fit, recorded_run, tmp_path):
    start = tmp_path / "start.ckpt"
    start.write_bytes((recorded_run / "checkpoints" / "last.ckpt").read_bytes())
    training.run([*fast_fit, f"--model.start_from={start}", "--trainer.max_steps=1"])
    start.unlink()
    load_module(str(tmp_path / "run" / "checkpoints" / "last.ckpt"), trust=["tiny"])


def test_start_from_takes_generator_fake_score_and_averages(tiny_pipeline, recorded_run):
    last = str(recorded_run / "checkpoints" / "last.ckpt")
    theirs, mine = load_module(last, trust=["tiny"]).roles, tiny.module(tiny_pipeline, start_from=last)
    mine.configure_model()
    roles = mine.roles
    for role in ("generator", "fake_score", "ema"):
        pairs = zip(getattr(theirs, role).parameters(), getattr(roles, role).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), role
    assert torch.equal(roles.old.proj_out.weight, theirs.old.proj_out.weight)
    assert not torch.equal(roles.teacher.proj_out.weight, theirs.generator.proj_out.weight)


def test_reference_is_the_generator_from_which_a_run_started_and_no_earlier_one(tiny_pipeline, tmp_path):
    options = {"reward": tiny.Brightness(), "steps": 2, "kl_weight": 0.1, "kl_reference": "start"}
    options |= {"generator": Optimization(learning_rate=0.01)}
    first, path = tiny.module(tiny_pipeline, DiffusionNFT, **options), str(tmp_path / "one.ckpt")
    tiny.train(first, 1).save_checkpoint(path)
    second = tiny.module(tiny_pipeline, DiffusionNFT, start_from=path, **options)
    tiny.train(second, 1)
    weights = [roles.proj_out.weight for roles in (first.roles.reference, first.roles.generator)]
    assert not torch.equal(*weights)
    assert torch.equal(second.roles.reference.proj_out.weight, weights[1])
    assert not torch.equal(second.roles.generator.proj_out.weight, weights[1])


def test_a_checkpoint_of_a_trainer_of_ones_own_is_restored_with_the_arguments_of_its_module(tiny_pipeline, tmp_path):
    options = {
        "images": ShapesImages(), "sampler": Renoise(), "lora": LoRA(rank=2), "steps": 2,
        "generator": Optimization(learning_rate=0.01, betas=(0.1, 0.9)),
        "matching": tiny.Matching(renoise_distribution=LogitNormal(mean=0.5), fake_score_updates=1),
    }  # fmt: skip
    trained, path = tiny.module(tiny_pipeline, DMD2, **options), str(tmp_path / "one.ckpt")
    tiny.train(trained, 1).save_checkpoint(path)
    assert picture_size(path) == (32, 32)
    restored, noise = load_module(path, role="ema"), latent_noise()
    assert (restored.matching, restored.generator, restored.lora) == (trained.matching, trained.generator, trained.lora)
    assert torch.equal(restored.generate(noise, TEXTS), trained.generate(noise, TEXTS))


def test_the_reward_of_a_script_does_not_keep_its_generator_from_being_restored(tiny_pipeline, tmp_path):
    class Scripted(tiny.Brightness):
        """Cannot be imported."""

    trained, path = tiny.module(tiny_pipeline, reward=Scripted()), str(tmp_path / "one.ckpt")
    tiny.train(trained, 1).save_checkpoint(path)
    noise = latent_noise()
    assert torch.equal(load_module(path, role="ema").generate(noise, TEXTS), trained.generate(noise, TEXTS))


def test_a_run_whose_checkpoints_no_command_can_load_says_so_at_its_start(tiny_pipeline, tmp_path, caplog):
    class Scripted(DMD):
        """Cannot be imported."""

    trained, path = tiny.module(tiny_pipeline, Scripted), str(tmp_path / "one.ckpt")
    with caplog.at_level("INFO"):
        tiny.train(trained, 1).save_checkpoint(path)
    assert "export cannot load checkpoints of this run (the class test_a_run" in caplog.text
    with pytest.raises(
        UserError, match=r"one\.ckpt' has no configuration; use a \.ckpt written by fit, or by a Trainer"
    ):
        load_module(path, role="ema")
