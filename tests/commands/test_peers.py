"""The benchmark next to other projects."""

import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peers.py"


def test_directory_that_is_no_checkout_of_a_peer_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--peer", str(tmp_path)])
    with pytest.raises(SystemExit, match="no checkout of NVlabs/FastGen or Harahan/RTDMD"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
