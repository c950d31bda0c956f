"""The benchmark that looks for growth over many updates."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    return soak


def test_growth_is_told_from_noise(soak):
    noise = [0.3, -0.2, 0.1, -0.4, 0.2, 0.0, -0.1, 0.3, -0.3, 0.1] * 2
    grows = soak.slope([100 + 0.2 * i + each for i, each in enumerate(noise)], updates_apart=50)
    assert grows.low < 4.0 < grows.high  # 0.2 per 50 updates
    assert grows.grows(1.0)
    assert not grows.grows(5.0), "below the limit"
    assert not soak.slope([100 + 20 * each for each in noise], updates_apart=50).grows(0.0), "noise"
    assert not soak.slope([100 - 0.2 * i for i in range(20)], updates_apart=50).grows(0.0), "falls"


def test_blocks_are_medians_of_equal_parts(soak):
    values = [1000.0 if i % 5 == 0 else i // 5 for i in range(100)]
    assert soak.in_blocks(values) == list(range(20))


@pytest.mark.slow
def test_a_short_run_prints_both_slopes(soak, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["soak.py", "--updates", "80", "--memory", "1e6", "--time", "1e6"])
    assert soak.main() == 0
    printed = capsys.readouterr().out
    assert "pass  memory: " in printed
    assert "pass  time: " in printed
