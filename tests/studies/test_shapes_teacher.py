"""Training the embedded pipeline, a few steps of each part."""

import pytest

from gdmd_lightning.shapes.settings import PretrainSettings, Stage
from gdmd_lightning.studies import shapes_teacher as study
from gdmd_lightning.studies.shapes_teacher import pretrain

SHORT = Stage(steps=2, batch_size=4)
PARTS = {"vae", "scorer", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}


def settings(out, **changes):
    sizes = {"pictures": 24, "num_layers": 1, "num_heads": 1}
    return PretrainSettings(out=out, autoencoder=SHORT, scorer=SHORT, teacher=SHORT, **sizes, **changes)


def test_pretrain_makes_a_pipeline_that_diffusers_loads(tmp_path):
    from diffusers import StableDiffusion3Pipeline

    out = pretrain(settings(tmp_path / "teacher"))
    assert {path.name for path in out.iterdir() if path.is_dir()} == PARTS | {"checkpoints"}
    assert (out / "scorer" / "tokenizer.json").is_file()
    pipe = StableDiffusion3Pipeline.from_pretrained(out, text_encoder_3=None, tokenizer_3=None)
    assert len(pipe.transformer.transformer_blocks) == 1


def test_pretrain_leaves_no_part_when_saving_is_interrupted(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(study.parts.AutoencoderKL, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints"}


def test_pretrain_completes_a_pipeline_whose_last_save_was_interrupted(tmp_path, monkeypatch):
    """The transformer is saved before the text encoders; its directory must not say that they are there."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study.parts.CLIPTextModelWithProjection, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "vae", "scorer"}
    out = pretrain(settings(tmp_path))
    assert {path.name for path in out.iterdir() if path.is_dir()} == PARTS | {"checkpoints"}
