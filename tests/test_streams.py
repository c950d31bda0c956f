"""Named random streams, and noise drawn from one stream or from one per row."""

import pytest
import torch

from gdmd_lightning.schedules import Uniform, draw_spread_sigmas
from gdmd_lightning.streams import BLOCK, BatchStream, draw_noise, draw_uniform, named_seed, python_stream, stream

CPU = torch.device("cpu")
SHAPE = (2, 4, 8, 8)


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_draw_noise_with_one_stream_equals_randn():
    (one,), (other,) = streams(3), streams(3)
    assert torch.equal(draw_noise(SHAPE, one, CPU), torch.randn(SHAPE, generator=other))


def test_draw_noise_of_a_row_depends_on_its_own_stream_only():
    both = draw_noise(SHAPE, streams(3, 4), CPU)
    assert torch.equal(both[1:], draw_noise((1, *SHAPE[1:]), streams(4), CPU))


def test_draw_noise_refuses_a_wrong_number_of_streams():
    with pytest.raises(ValueError, match="1 streams for 2 rows"):
        draw_noise(SHAPE, [torch.Generator()], CPU)


def test_stream_is_a_function_of_its_name():
    one, same, other = (torch.rand(4, generator=stream("noise", 0, name)) for name in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_part_of_a_streams_name_changes_its_draws():
    names = [(0, 0, 0, "rollout", 0), (1, 0, 0, "rollout", 0), (0, 1, 0, "rollout", 0), (0, 0, 1, "rollout", 0),
             (0, 0, 0, "level", 0), (0, 0, 0, "rollout", 1)]  # fmt: skip
    draws = {tuple(torch.rand(4, generator=stream(*name)).tolist()) for name in names}
    assert len(draws) == len(names)


def test_parts_of_a_streams_name_do_not_run_together():
    assert named_seed(1, 23) != named_seed(12, 3)


def test_python_stream_is_a_function_of_its_name():
    assert python_stream("a", 1).random() == python_stream("a", 1).random() != python_stream("a", 2).random()


# A batch that ranks share.


def shared(ranks: int) -> list[BatchStream]:
    """The stream of one batch on each rank."""
    return [BatchStream(lambda *place: stream(5, *place, "renoise"), rank, ranks) for rank in range(ranks)]


def joined(ranks: int, rows: int, draw) -> list:
    """What all ranks draw together, one after another, as lists."""
    return [row for rng in shared(ranks) for row in draw(rng, rows // ranks).tolist()]


DRAWS = {
    "noise": lambda rng, rows: draw_noise((rows, 2, 3), rng, CPU),
    "numbers": lambda rng, rows: draw_uniform((rows, 2), rng),
    "noise after numbers": lambda rng, rows: (draw_uniform((rows,), rng), draw_noise((rows, 2, 3), rng, CPU))[1],
    "levels": lambda rng, rows: draw_spread_sigmas(Uniform(0, 1), rows, rng),
    "rows": lambda rng, rows: torch.stack([torch.rand(3, generator=row) for row in rng.each_row(rows)]),
    "common after noise": lambda rng, rows: (
        draw_noise((rows, 2, 3), rng, CPU), torch.randint(10**9, (1,), generator=rng.common).expand(rows))[1],
    "common twice": lambda rng, rows: (
        draw_noise((rows, 2), rng, CPU), rng.common, torch.rand(1, generator=rng.common).expand(rows))[2],
}  # fmt: skip


@pytest.mark.parametrize("rows", [8, BLOCK, 120, 2 * BLOCK, 280])
@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_batch_draws_the_same_on_any_number_of_ranks(draw, rows):
    alone = joined(1, rows, draw)
    assert joined(2, rows, draw) == joined(4, rows, draw) == joined(8, rows, draw) == alone


@pytest.mark.parametrize("rows", [3, BLOCK])
def test_a_batch_of_one_block_draws_what_its_stream_gives(rows):
    (rng,), alone = shared(1), stream(5, 0, "renoise")
    for _ in range(2):
        assert torch.equal(draw_noise((rows, 3), rng, CPU), torch.randn(rows, 3, generator=alone))


def test_rows_of_a_batch_differ_in_every_block():
    noise = draw_noise((3 * BLOCK, 4), shared(1)[0], CPU)
    assert len({tuple(row) for row in noise.tolist()}) == 3 * BLOCK
    rows = [float(torch.rand(1, generator=row)) for row in shared(1)[0].each_row(2)]
    assert len({*rows, float(torch.rand(1, generator=stream(5, 0, "renoise")))}) == 3


def test_levels_of_a_batch_are_in_strata_of_the_batch_of_all_ranks():
    levels = torch.tensor(joined(4, 20, DRAWS["levels"]))
    assert torch.equal((levels * 20).long(), torch.arange(20))
