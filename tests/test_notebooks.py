"""The notebooks run from top to bottom on the record of a run."""

import io
import os
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.name for path in NOTEBOOKS.glob("*.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_code_of_notebook_runs_and_draws(name, recorded_run, monkeypatch):
    """In this process: a kernel would import torch again."""
    monkeypatch.setenv("GDMD_RUN", str(recorded_run))
    monkeypatch.chdir(NOTEBOOKS)
    plt.switch_backend("agg")
    plt.close("all")
    notebook, space = nbformat.read(NOTEBOOKS / name, as_version=4), {}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, name, "exec"), space)
    drawn = plt.get_fignums()
    for number in drawn:
        plt.figure(number).savefig(io.BytesIO(), dpi=72)
    plt.close("all")
    assert len(drawn) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_notebook_executes_and_draws(name, recorded_run, monkeypatch):
    monkeypatch.setenv("GDMD_RUN", str(recorded_run))
    monkeypatch.setitem(os.environ, "MPLBACKEND", "module://matplotlib_inline.backend_inline")
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOKS)}}).execute()
    pictures = [
        o
        for cell in notebook.cells
        if cell.cell_type == "code"
        for o in cell.outputs
        if "image/png" in o.get("data", {})
    ]
    assert len(pictures) >= 3
