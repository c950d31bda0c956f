"""Logged scalars are read back from the files of both local loggers."""

from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from gdmd_lightning.callbacks.logged_figures import read_figures


@pytest.mark.parametrize("kind", [TensorBoardLogger, CSVLogger])
def test_figures_are_read_by_prefix_and_sorted_by_update(tmp_path: Path, kind: type[Logger]) -> None:
    logger = kind(tmp_path, name="run", version=".")
    for update, value in ((20, 0.5), (10, 0.25)):
        logger.log_metrics({"eval/a": value, "eval/b/overall": 2 * value, "train/a": 7.0}, step=update)
    logger.save()
    logger.finalize("success")
    run = tmp_path / "run"
    assert read_figures(run, "eval/") == {
        "eval/a": [(10, 0.25), (20, 0.5)],
        "eval/b/overall": [(10, 0.5), (20, 1.0)],
    }


def test_an_update_that_was_logged_twice_has_its_last_value(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        logger = TensorBoardLogger(tmp_path, name="run", version=".")
        logger.log_metrics({"eval/a": value}, step=10)
        logger.finalize("success")
    assert read_figures(tmp_path / "run", "eval/") == {"eval/a": [(10, 2.0)]}


def test_a_run_without_local_loggers_has_no_figures(tmp_path: Path) -> None:
    assert read_figures(tmp_path, "eval/") == {}
