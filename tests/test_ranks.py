"""What ranks exchange about a batch that they share; two processes against one with all rows."""

import pytest
import torch
from torch import distributed, multiprocessing

from gdmd_lightning import ranks

ROWS = torch.tensor([[1.0, 8.0], [2.0, 7.0], [4.0, 5.0], [9.0, 0.0], [3.0, 3.0], [6.0, 6.0]])
CPU = torch.device("cpu")


def on_a_rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    own = ROWS[3 * rank : 3 * rank + 3]
    found = {
        "place": ranks.place(),
        "whole": ranks.gathered(own.requires_grad_()),
        "own": ranks.own_part(10 * ROWS),
        "groups": ranks.all_groups(torch.tensor([0, 0, 1])),
        "std": ranks.std(own),
        "means": ranks.mean_over_ranks({"a": own.mean(), "b": torch.tensor(float(rank))}, CPU),
    }
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(on_a_rank, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_rows_are_those_of_all_ranks_in_their_order(two_ranks):
    for rank, found in enumerate(two_ranks):
        assert found["place"] == (rank, 2)
        assert torch.equal(found["whole"], ROWS)
        assert not found["whole"].requires_grad
        assert torch.equal(found["own"], 10 * ROWS[3 * rank : 3 * rank + 3])


def test_groups_go_on_from_rank_to_rank(two_ranks):
    for found in two_ranks:
        assert found["groups"].tolist() == [0, 0, 1, 2, 2, 3]


def test_figures_are_those_of_the_whole_batch(two_ranks):
    for found in two_ranks:
        torch.testing.assert_close(found["std"], ROWS.std())
        torch.testing.assert_close(found["means"], {"a": ROWS.mean(), "b": torch.tensor(0.5)})


def test_one_process_exchanges_nothing():
    values = {"a": ROWS.sum()}
    assert ranks.place() == (0, 1)
    assert ranks.gathered(ROWS) is ROWS
    assert torch.equal(ranks.own_part(ROWS), ROWS)
    assert ranks.all_groups(torch.tensor([0, 0, 1])).tolist() == [0, 0, 1]
    assert torch.equal(ranks.std(ROWS), ROWS.std())
    assert ranks.mean_over_ranks(values, CPU) is values
