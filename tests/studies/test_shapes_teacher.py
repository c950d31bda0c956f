"""Training the embedded pipeline, a few steps of each part."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from gdmd_lightning.errors import UserError
from gdmd_lightning.locations import resolve
from gdmd_lightning.shapes.pretraining import AutoencoderTraining
from gdmd_lightning.shapes.settings import PretrainSettings, Stage
from gdmd_lightning.studies import shapes_teacher as study
from gdmd_lightning.studies.shapes_teacher import pretrain

SHORT = Stage(steps=2, batch_size=4)
PARTS = {"vae", "scorer", "transformer", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"}
STATES = ("state_dict", "current_model_state")  # of a checkpoint with averages: averaged and raw weights


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


def test_pretrain_saves_the_tokenizer_it_trains_with(tmp_path, monkeypatch):
    """It is the shipped one, or, for text encoders that are trained on, theirs."""
    from transformers import CLIPTokenizer

    seen = []
    train = study._train

    def spied(module, batches, stage, settings, name, *callbacks):
        if name == "teacher":
            seen.extend(batches.dataset[0][1].tolist())
        train(module, batches, stage, settings, name, *callbacks)

    monkeypatch.setattr(study, "_train", spied)
    first = pretrain(settings(tmp_path / "first"))
    shipped = CLIPTokenizer.from_pretrained(resolve("package:assets/shapes/tokenizer")).get_vocab()
    assert CLIPTokenizer.from_pretrained(first / "tokenizer").get_vocab() == shipped
    # As an earlier version left it: the ids of two words are swapped.
    swapped = json.loads((first / "tokenizer" / "tokenizer.json").read_text())
    vocab = swapped["model"]["vocab"]
    vocab["a</w>"], vocab["circle</w>"] = vocab["circle</w>"], vocab["a</w>"]
    (first / "tokenizer" / "tokenizer.json").write_text(json.dumps(swapped))
    seen.clear()
    second = pretrain(settings(tmp_path / "second", start_from=first))
    tokenizer = CLIPTokenizer.from_pretrained(second / "tokenizer")
    assert tokenizer.get_vocab() == vocab
    caption = study.make_pictures(24, 2).captions[0]
    assert seen == tokenizer(caption, padding="max_length").input_ids
    assert CLIPTokenizer.from_pretrained(second / "scorer").get_vocab() == vocab


def test_pretrain_leaves_no_part_when_saving_is_interrupted(tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(study.parts.AutoencoderKL, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "settings.json"}


def test_pretrain_completes_a_pipeline_whose_last_save_was_interrupted(tmp_path, monkeypatch):
    """The transformer is saved before the text encoders; its directory must not say that they are there."""

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(study.parts.CLIPTextModelWithProjection, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "settings.json", "vae", "scorer"}
    out = pretrain(settings(tmp_path))
    assert {path.name for path in out.iterdir() if path.is_dir()} == PARTS | {"checkpoints"}


def test_pretrain_saves_the_averaged_weights_also_if_its_last_save_failed_once(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    def every_step(directory, **options):
        return ModelCheckpoint(directory, **{**options, "every_n_train_steps": 1})

    monkeypatch.setattr(study, "ModelCheckpoint", every_step)
    with monkeypatch.context() as patched:
        patched.setattr(study.parts.CLIPTextModelWithProjection, "save_pretrained", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(settings(tmp_path))
    saved = load_file(pretrain(settings(tmp_path)) / "transformer" / "diffusion_pytorch_model.safetensors")
    last = torch.load(tmp_path / "checkpoints" / "teacher" / "last.ckpt", weights_only=True)
    assert last["global_step"] == SHORT.steps
    averaged, raw = ({name: last[key][f"transformer.{name}"].half() for name in saved} for key in STATES)
    assert all(torch.equal(saved[name], averaged[name]) for name in saved)
    assert not all(torch.equal(saved[name], raw[name]) for name in saved)


@pytest.fixture
def untrained(monkeypatch):
    """Nothing is trained."""
    monkeypatch.setattr(study, "_check_earlier", lambda *_: None)
    monkeypatch.setattr(study, "_train_missing", lambda settings: None)


def test_pretrain_refuses_other_settings_than_the_parts_that_are_there_were_trained_with(tmp_path, untrained):
    out = pretrain(settings(tmp_path / "pt"))
    (out / "checkpoints").mkdir()
    pretrain(settings(out, threads=torch.get_num_threads()))
    changed = replace(settings(out), teacher=replace(SHORT, steps=3), start_from=tmp_path / "earlier")
    expected = (
        f"pretrain: teacher.steps is 3 (was 2), start_from is '{tmp_path / 'earlier'}' (was None) in {out}; use an"
    )
    with pytest.raises(UserError, match=re.escape(expected)):
        pretrain(changed)
    (out / "settings.json").unlink()  # as an earlier version left it
    pretrain(changed)
    assert not (out / "settings.json").exists()


def test_pretrain_takes_other_settings_where_nothing_was_trained(tmp_path, untrained):
    pretrain(settings(tmp_path))
    (tmp_path / "vae").mkdir()  # a copy
    pretrain(settings(tmp_path, seed=1))
    assert json.loads((tmp_path / "settings.json").read_text())["seed"] == 1


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 21])
def test_learning_rate_of_any_number_of_steps(steps):
    module = AutoencoderTraining(torch.nn.Linear(1, 1), 1e-3)
    module._trainer = SimpleNamespace(max_steps=steps)
    found = module.configure_optimizers()
    rates = []
    for _ in range(steps):
        (rate,) = found["lr_scheduler"]["scheduler"].get_last_lr()
        rates.append(rate)
        found["optimizer"].step()
        if len(rates) < steps:
            found["lr_scheduler"]["scheduler"].step()
    assert all(0 < rate <= 1e-3 for rate in rates)


def test_an_earlier_pipeline_that_does_not_suit_is_refused_before_anything_is_written(tmp_path):
    earlier = tmp_path / "earlier"
    for part in ("tokenizer", "text_encoder", "text_encoder_2"):
        (earlier / part).mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(f"--start_from: there is no {earlier / 'transformer'}; ")):
        pretrain(settings(tmp_path / "out", start_from=earlier))
    study.parts.build_transformer(2, 1).save_config(earlier / "transformer")
    with pytest.raises(UserError, match=r"--num_layers: it is 1, and the transformer of \S+ has 2; "):
        pretrain(settings(tmp_path / "out", start_from=earlier))
    assert not (tmp_path / "out").exists()
