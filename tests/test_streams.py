"""Named random streams, and noise drawn from one stream or from one per row."""

import pytest
import torch

from gdmd_lightning.streams import draw_noise, named_seed, python_stream, stream

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
