"""The embedded pipeline: small, safe to load, loadable by diffusers, and deliberately beatable."""

from pathlib import Path

import pytest
import torch

from gdmd_lightning.locations import resolve

ASSETS = Path(resolve("package:assets/shapes"))


def test_assets_are_safetensors_and_text_of_at_most_12_megabytes():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_assets_load_and_sample_with_diffusers():
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline.from_pretrained(ASSETS, text_encoder_3=None, tokenizer_3=None)
    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        ["a red circle"], num_inference_steps=2, guidance_scale=3.0, max_sequence_length=0, output_type="pt"
    ).images
    assert images.shape == (1, 3, 32, 32)
    assert torch.isfinite(images).all()


def test_tokenizer_has_one_token_per_known_word():
    from transformers import CLIPTokenizer

    from gdmd_lightning.shapes.captions import WORDS

    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "tokenizer")
    assert all(len(tokenizer(word).input_ids) == 3 for word in WORDS)  # start, word, end


@pytest.mark.slow
def test_teacher_is_good_but_beatable():
    from gdmd_lightning.studies.contestants import bare_teacher, teachers
    from gdmd_lightning.studies.scorecards import score
    from gdmd_lightning.studies.tasks import SHAPES

    rows = score(teachers(bare_teacher(SHAPES), 30, 3.0)[:1], SHAPES, 600).rows
    assert 0.55 <= rows[0].scores["geneval/overall"].mean <= 0.85
