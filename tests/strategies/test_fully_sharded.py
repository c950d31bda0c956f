"""FSDP2Strategy without our methods."""

from pathlib import Path

import pytest
import torch
from processes import run_ranks
from safetensors.torch import save_file

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_frozen_network_is_never_whole_on_a_rank(ranks, tmp_path):
    from toy_runs import large

    whole = large()
    save_file(whole.state_dict(), tmp_path / "large.safetensors")
    size = sum(parameter.numel() * 4 for parameter in whole.parameters())
    run_ranks(HERE / "fsdp2_peak.py", tmp_path, ranks=ranks)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"peak-{rank}.pt")
        assert found["bytes"] == size / ranks
        assert 0.9 * size / ranks < found["peak"] <= (1 / ranks + 0.05) * size, found["peak"] / size
        assert found["sum"] == pytest.approx(sum(float(value.sum()) for value in whole.parameters()), rel=1e-4)
