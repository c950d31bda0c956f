"""A prompt that is too long for a text encoder is reported in one line per run."""

import logging

import pytest
import tiny

from gdmd_lightning.families import base
from gdmd_lightning.families.flux2 import Flux2KleinFamily
from gdmd_lightning.families.sd3 import SD3Family
from gdmd_lightning.families.sdxl import SDXLFamily
from gdmd_lightning.families.truncation import cut_notice

LONG = "red circle " * 150
SAVED = {
    "sd3": (tiny.save_pipeline, lambda path: SD3Family(path, max_sequence_length=0)),
    "sdxl": (tiny.save_sdxl, SDXLFamily),
    "flux2": (tiny.save_flux2, lambda path: Flux2KleinFamily(path, max_sequence_length=32, text_layers=(1, 2))),
}


@pytest.mark.parametrize("name", SAVED)
def test_family_reports_once_that_prompts_are_cut(name, tmp_path, monkeypatch, capfd):
    save, make = SAVED[name]
    family = make(str(save(tmp_path / name)))
    family.load()
    told = []
    monkeypatch.setattr(base, "rank_zero_info", told.append)
    logging.getLogger("diffusers").setLevel(logging.WARNING)
    family.encode(["a red circle"])
    assert told == []
    capfd.readouterr()
    for _ in range(2):
        family.encode(["a red circle", LONG, LONG])
    assert capfd.readouterr().err == ""
    (line,) = told
    tokenizer, limit = next(iter(family.token_limits().items()))
    # The pipeline's tensors show the limit itself.
    sequence = family.encode([LONG]).sequence
    assert sequence.shape[1] == limit
    assert line.startswith(f"prompts are cut to the tokens that the text encoders take ({tokenizer} {limit}")
    assert f"prompt has {family.token_count(tokenizer, LONG)}: 'red circle red " in line


def test_cut_notice_counts_each_tokenizer():
    def count(name: str, text: str) -> int:
        return len(text.split()) * (2 if name == "b" else 1)

    limits = {"a": 4, "b": 8}
    assert cut_notice(["one two three four"], limits, count) is None
    assert cut_notice(["one", "one two three four five"], limits, count) == (
        "prompts are cut to the tokens that the text encoders take (a 4, b 8); "
        "the first such prompt has 10: 'one two three four five'"
    )
    assert "has 6: 'one two three'" in str(cut_notice(["one two three"], {"a": 4, "b": 5}, count))
    assert cut_notice([LONG], {}, count) is None
