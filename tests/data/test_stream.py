"""The order of prompts is a pure function of source and seed; ranks and workers share it exactly."""

import pickle
from collections import Counter
from itertools import chain, islice
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from gdmd_lightning.data.readers import PromptSource, open_source
from gdmd_lightning.data.stream import PromptStream, shuffled
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt

ROWS = 24

pytestmark = pytest.mark.filterwarnings("ignore:.*worker processes")


@pytest.fixture
def source(tmp_path: Path) -> PromptSource:
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{i}\n" for i in range(ROWS)))
    return open_source(str(path))


def items(source: PromptSource, count: int, *, seed: int = 0, block: int = 7, start: int = 0) -> list[int]:
    return [int(prompt.text) for prompt in islice(shuffled(source, seed=seed, block=block, start=start), count)]


def unchanged(batch: object) -> object:
    return batch


def batches(stream: PromptStream, count: int, num_workers: int = 0) -> list[list[int]]:
    loader = DataLoader(stream, batch_size=None, num_workers=num_workers, collate_fn=unchanged)
    return [[int(prompt.text) for prompt in batch.prompts] for batch in islice(loader, count)]


def flat(lists: list[list[int]]) -> list[int]:
    return list(chain.from_iterable(lists))


def test_every_pass_has_every_row_once_in_a_different_order(source: PromptSource) -> None:
    order = items(source, 3 * ROWS)
    passes = [order[i * ROWS : (i + 1) * ROWS] for i in range(3)]
    assert all(sorted(one) == list(range(ROWS)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3


def test_order_depends_on_the_seed(source: PromptSource) -> None:
    assert items(source, 50, seed=1) == items(source, 50, seed=1) != items(source, 50, seed=2)


def test_rows_are_shuffled_within_their_block(source: PromptSource) -> None:
    order = items(source, ROWS, block=7)
    assert [sorted(order[i : i + 7]) for i in range(0, ROWS, 7)] == [
        list(range(i, min(i + 7, ROWS))) for i in range(0, ROWS, 7)
    ]
    assert order != sorted(order)


@pytest.mark.parametrize("block", [0, 1])
def test_buffer_of_at_most_one_row_keeps_the_order(source: PromptSource, block: int) -> None:
    assert items(source, 2 * ROWS, block=block) == 2 * list(range(ROWS))


@pytest.mark.parametrize("block", [1, 5, 7, 8, ROWS, 100])
def test_order_can_start_at_any_item(source: PromptSource, block: int) -> None:
    order = items(source, 5 * ROWS, block=block)
    for start in range(4 * ROWS):
        assert items(source, ROWS, block=block, start=start) == order[start : start + ROWS]


class Counted:
    """A source of rows 0, 1, ... that records where it was read and how often it was counted."""

    name = "counted"

    def __init__(self, rows: int) -> None:
        self.rows, self.reads, self.counts = rows, [], 0

    def read(self, start: int = 0):
        self.reads.append(start)
        return (Prompt(str(row)) for row in range(start, self.rows))

    def count(self) -> int:
        self.counts += 1
        return self.rows


def test_late_start_skips_whole_passes_by_arithmetic() -> None:
    source = Counted(ROWS)
    late = items(source, 3, start=10**12 * ROWS + 13, block=7)
    assert late == items(Counted(ROWS), 20, start=10**12 * ROWS, block=7)[13:16]
    assert source.counts == 1
    assert source.reads == [(10**12 * ROWS + 13) // 7 * 7, 7]


def test_start_in_the_first_pass_does_not_count_the_rows() -> None:
    source = Counted(ROWS)
    items(source, 3, start=13, block=7)
    assert (source.counts, source.reads) == (0, [7])


def test_source_that_became_empty_is_an_error() -> None:
    with pytest.raises(UserError, match="counted: there is no prompt in it"):
        items(Counted(0), 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_ranks_and_workers_share_every_pass_without_overlap_or_loss(source: PromptSource, num_workers: int) -> None:
    # With 3 prompts per batch and 2 ranks, 4 batches of each rank are one pass.
    ranks = [PromptStream(source, 0, 7, prompts=3, group_size=1, rank=rank, world_size=2) for rank in range(2)]
    of_rank = [flat(batches(stream, 12, num_workers)) for stream in ranks]
    for i in range(0, 36, 12):
        one_pass = Counter(of_rank[0][i : i + 12] + of_rank[1][i : i + 12])
        assert one_pass == Counter(range(ROWS))


def test_no_prompt_is_lost_if_a_batch_spans_two_passes(source: PromptSource) -> None:
    # With 5 prompts per batch and 2 ranks, 12 batches of each rank are 5 passes; most end within a batch.
    ranks = [PromptStream(source, 0, 7, prompts=5, group_size=1, rank=rank, world_size=2) for rank in range(2)]
    of_rank = [flat(batches(stream, 12)) for stream in ranks]
    assert Counter(of_rank[0] + of_rank[1]) == Counter(dict.fromkeys(range(ROWS), 5))
    # Each rank has a half of what one process would see at once.
    whole = items(source, 120)
    for n in range(12):
        assert of_rank[0][5 * n : 5 * n + 5] + of_rank[1][5 * n : 5 * n + 5] == whole[10 * n : 10 * n + 10]


def test_groups_stay_together(source: PromptSource) -> None:
    stream = PromptStream(source, 0, 7, prompts=5, group_size=3)
    for batch in islice(stream, 12):
        assert (len(batch), batch.group_size) == (15, 3)
        for i in range(0, 15, 3):
            assert len({prompt.text for prompt in batch.prompts[i : i + 3]}) == 1
    (first,) = batches(stream, 1)
    assert first[::3] == items(source, 5)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 5])
def test_number_of_workers_does_not_change_the_batches(source: PromptSource, num_workers: int, start: int) -> None:
    stream = PromptStream(source, 0, 7, prompts=5, group_size=2, rank=1, world_size=2, start=start)
    assert batches(stream, 9, num_workers) == batches(stream, 9)


def test_workers_share_a_hugging_face_data_set_of_several_files(tmp_path: Path) -> None:
    for i in range(3):
        (tmp_path / f"train-{i}.jsonl").write_text("".join(f'{{"prompt": "{8 * i + j}"}}\n' for j in range(8)))
    stream = PromptStream(open_source(str(tmp_path)), 0, 1, prompts=4, group_size=1)
    assert flat(batches(stream, 12, num_workers=2)) == 2 * list(range(ROWS))


def test_stream_can_be_pickled(source: PromptSource) -> None:
    stream = PromptStream(source, 0, 7, prompts=5, group_size=2)
    assert batches(pickle.loads(pickle.dumps(stream)), 3) == batches(stream, 3)
