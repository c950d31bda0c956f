"""The page about the strategy shows the module that the tests run."""

import re
from pathlib import Path

import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch.strategies import Strategy

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "deepspeed.md"


def test_page_shows_the_tested_module():
    (shown,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    tested = (HERE / "toy_gan.py").read_text(encoding="utf-8")
    assert tested.partition("\n\n")[2] == shown


def test_page_configuration_builds_the_strategy():
    (shown,) = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Strategy, "strategy")
    strategy = parser.instantiate_classes(
        parser.parse_object({"strategy": yaml.safe_load(shown)["trainer"]["strategy"]})
    ).strategy
    assert strategy.stage_of("generator") == 3
    assert strategy.stage_of("critic") == 1
    assert strategy.config_of("generator", 3)["gradient_clipping"] == 1.0
