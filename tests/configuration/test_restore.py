"""Modules restored from checkpoints."""

import torch

from gdmd_lightning.configuration import training
from gdmd_lightning.configuration.restore import load_module

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
    import tiny

    last = str(recorded_run / "checkpoints" / "last.ckpt")
    theirs, mine = load_module(last, trust=["tiny"]).roles, tiny.module(tiny_pipeline, start_from=last)
    mine.configure_model()
    roles = mine.roles
    for role in ("generator", "fake_score", "ema"):
        pairs = zip(getattr(theirs, role).parameters(), getattr(roles, role).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), role
    assert torch.equal(roles.old.proj_out.weight, theirs.old.proj_out.weight)
    assert not torch.equal(roles.teacher.proj_out.weight, theirs.generator.proj_out.weight)
