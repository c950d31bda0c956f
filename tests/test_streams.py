"""Named random streams, and noise drawn from one stream or from one per row."""

import pytest
import torch

from gdmd_lightning.streams import draw_noise

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
