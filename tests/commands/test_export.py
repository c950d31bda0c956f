"""An exported generator is a plain diffusers pipeline that gives our pictures from our noise."""

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from gdmd_lightning.cli import main
from gdmd_lightning.commands import fit
from gdmd_lightning.commands.export import export, snippet
from gdmd_lightning.commands.restore import load_module
from gdmd_lightning.errors import UserError
from gdmd_lightning.samplers import FewStepSampler

TEXTS = ["a red circle", "two blue squares left of a green triangle"]


@pytest.fixture(scope="module")
def noise():
    return torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))


@pytest.fixture
def module(recorded_run):
    return load_module(str(recorded_run / "checkpoints" / "last.ckpt"))


def load(path) -> StableDiffusion3Pipeline:
    pipeline = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(pipeline, noise, steps=4) -> torch.Tensor:
    """A plain call, with nothing in it but what the snippet says and our noise."""
    settings = {"num_inference_steps": steps, "guidance_scale": 1.0, "max_sequence_length": 0}
    return pipeline(TEXTS, **settings, latents=noise.clone(), output_type="pt").images


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_exported_pipeline_gives_our_pictures_from_our_noise(recorded_run, tmp_path, noise, steps):
    module = load_module(str(recorded_run / "checkpoints" / "last.ckpt"))
    module.sampler = FewStepSampler(steps)
    module.sigmas = module.family.few_step_sigmas(steps)
    path = export(module, tmp_path / "pipeline")
    torch.testing.assert_close(pictures(load(path), noise, steps), module.generate(noise, TEXTS), atol=1e-4, rtol=0)


def test_with_renoising_too_given_the_same_noise_on_the_way(module, tmp_path, noise):
    module.sampler = FewStepSampler(4, "renoise")
    pipeline = load(export(module, tmp_path / "pipeline"))
    torch.manual_seed(module.seed)  # diffusers' scheduler draws from the global stream
    theirs = pictures(pipeline, noise)
    torch.testing.assert_close(theirs, module.generate(noise, TEXTS), atol=1e-4, rtol=0)
    torch.manual_seed(module.seed + 1)
    assert not torch.allclose(pictures(pipeline, noise), theirs, atol=1e-3)


def test_the_averaged_weights_are_taken_unless_told(module, tmp_path):
    averaged = load(export(module, tmp_path / "averaged")).transformer
    present = load(export(module, tmp_path / "present", averaged=False)).transformer
    networks = module.networks
    for mine, theirs in ((networks.ema.module, averaged), (networks.generator, present)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(averaged.proj_out.weight, present.proj_out.weight)


def test_what_cannot_be_repeated_is_refused_and_nothing_is_left(module, tmp_path):
    module.sampler = FewStepSampler(4, "cps")
    with pytest.raises(UserError, match="no scheduler for cps"):
        export(module, tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())


def test_an_export_that_fails_half_way_leaves_no_pipeline(module, tmp_path, monkeypatch):
    def save(pipeline, path, **options):
        path.mkdir(exist_ok=True)
        (path / "model_index.json").write_text("{}")
        raise OSError("no space left on device")

    monkeypatch.setattr(StableDiffusion3Pipeline, "save_pretrained", save)
    with pytest.raises(UserError, match=r"cannot write .*no space left"):
        export(module, tmp_path / "pipeline")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    load(export(module, tmp_path / "pipeline"))


def test_the_command_exports_and_says_how_to_load(recorded_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["export", str(recorded_run / "checkpoints" / "last.ckpt"), "pipeline"])
    said = capsys.readouterr().out
    code = said.replace('"a red circle"', '"a red circle", height=32, width=32')
    assert "text_encoder_3=None, tokenizer_3=None" in said
    exec(code, {})
    assert (tmp_path / "picture.png").is_file()
    assert said.split("\n", 1)[1].strip() in (tmp_path / "pipeline" / "README.md").read_text()


def test_the_snippet_is_two_lines(module, tmp_path):
    assert len(snippet(module, tmp_path).splitlines()) == 2


def test_a_checkpoint_comes_back_as_the_module_that_wrote_it(fast_fit, tmp_path, noise):
    cli = fit.run([*fast_fit, "--model.lambda_policy=0.5", "--model.sampler.kind=renoise"])
    module = load_module(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    assert type(module) is type(cli.model)
    assert (module.lambda_policy, module.sampler, module.policy) == (0.5, cli.model.sampler, cli.model.policy)
    assert type(module.reward).__name__ == "Brightness"
    assert torch.equal(module.generate(noise, TEXTS), cli.model.generate(noise, TEXTS))


def test_a_run_that_started_from_another_is_restored_without_it(fast_fit, recorded_run, tmp_path):
    start = tmp_path / "start.ckpt"
    start.write_bytes((recorded_run / "checkpoints" / "last.ckpt").read_bytes())
    fit.run([*fast_fit, f"--model.start_from={start}", "--trainer.max_steps=1"])
    start.unlink()
    load_module(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))


def test_a_start_takes_over_generator_fake_score_and_averages(tiny_pipeline, recorded_run):
    import tiny

    last = str(recorded_run / "checkpoints" / "last.ckpt")
    theirs, mine = load_module(last).networks, tiny.module(tiny_pipeline, start_from=last)
    mine.configure_model()
    networks = mine.networks
    for role in ("generator", "fake_score", "ema"):
        pairs = zip(getattr(theirs, role).parameters(), getattr(networks, role).parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs), role
    # What the policy calls old is the generator as it starts.
    assert torch.equal(networks.old.module.proj_out.weight, theirs.generator.proj_out.weight)
    assert not torch.equal(networks.teacher.proj_out.weight, theirs.generator.proj_out.weight)
