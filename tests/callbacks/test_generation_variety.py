"""Prompts of the measurement of diversity."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gdmd_lightning.callbacks.variety import GenerationVariety
from gdmd_lightning.errors import UserError


@pytest.fixture
def drawbench(tmp_path):
    """Four prompts of two categories, whose column has another name."""
    file = tmp_path / "drawbench.csv"
    file.write_text("Prompts,Category\na cat,Animals\na dog,Animals\na red car,Colors\na blue car,Colors\n")
    return str(file)


def texts(source, **options):
    return [prompt.text for prompt in GenerationVariety(source, **options).prompts]


def test_variety_reads_the_column_that_is_named(drawbench):
    assert texts(drawbench, column="Prompts", count=2) == ["a cat", "a dog"]


def test_variety_spreads_prompts_with_a_tag(drawbench):
    assert texts(drawbench, column="Prompts", tag="Category", count=2) == ["a cat", "a red car"]


def test_variety_takes_the_split_of_a_data_set(monkeypatch):
    asked = {}

    def read(source, count, **options):
        asked.update(options)
        return []

    monkeypatch.setattr("gdmd_lightning.callbacks.variety.read_evaluation_prompts", read)
    GenerationVariety("someone/prompts", split="test")
    assert asked == {"column": "prompt", "split": "test", "tag": None}


def test_variety_refuses_a_column_that_is_not_there(drawbench):
    with pytest.raises(UserError, match=r"drawbench\.csv:1: no column 'prompt'; it has 'Prompts', 'Category'"):
        GenerationVariety(drawbench)


class Noises:
    """Stands in for a module whose pictures are their noise."""

    device, latent_shape, updates = torch.device("cpu"), (3, 8, 8), 1
    roles = SimpleNamespace(lockstep=lambda role: nullcontext())
    family = SimpleNamespace(encode_images=lambda images: images)
    log_dict = staticmethod(lambda *_, **__: None)

    @staticmethod
    def generate(noise, texts):
        return noise.sigmoid()


def test_variety_of_one_and_two_ranks_agrees_in_float64(drawbench):
    def measured(rank: int, ranks: int, others: list) -> dict[str, float]:
        def reduce(sums, reduce_op):
            others.append(sums.clone())
            return torch.stack(others).sum(0)

        trainer = SimpleNamespace(
            global_rank=rank, world_size=ranks, strategy=SimpleNamespace(reduce=reduce), logged_metrics={}, loggers=[]
        )
        GenerationVariety(drawbench, column="Prompts", count=3, samples=4).run(trainer, Noises())
        return {name: float(value) for name, value in trainer.logged_metrics.items()}

    others: list = []
    measured(1, 2, others)
    together, alone = measured(0, 2, others), measured(0, 1, [])
    assert together == pytest.approx(alone, rel=1e-14, abs=0)
    assert 0 < alone["variety/latent_std"] < 1
