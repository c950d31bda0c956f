"""What a reward does not see: how different the samples of a prompt are."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distance(images: Tensor) -> Tensor:
    """Mean distance between the samples of each prompt, ``[P]``, in [0, 1]: root mean square over pixels.

    A generator that collapses to one picture per prompt has 0.

    Args:
        images: ``S`` samples of each of ``P`` prompts, ``[P, S, 3, H, W]`` in [0, 1], ``S`` at least 2.

    Raises:
        ValueError: If there is only one sample per prompt.
    """
    count = images.shape[1]
    if count < 2:
        raise ValueError("distances need at least 2 samples per prompt")
    one, two = torch.triu_indices(count, count, offset=1)
    flat = images.flatten(2).double()
    return (flat[:, one] - flat[:, two]).square().mean(-1).sqrt().mean(-1)
