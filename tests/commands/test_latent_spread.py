"""The benchmark that measures how far generators are from their teacher's manifold."""

import runpy
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latent_spread.py"


def test_latent_spread_prints_a_line_for_the_teacher_and_each_checkpoint(recorded_run, monkeypatch, capsys):
    last = str(recorded_run / "checkpoints" / "last.ckpt")
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), last, last, "--count", "6", "--steps", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    assert [line[1] for line in lines] == ["teacher, 2 steps, guided", last, last]
    assert lines[1] == lines[2]
    assert all(0 < float(line[0]) < 10 for line in lines)
