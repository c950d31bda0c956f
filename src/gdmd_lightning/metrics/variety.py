"""What a reward does not see: how different the samples of a prompt are, and how free choices are made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gdmd_lightning.geneval.detector import Detector
from gdmd_lightning.prompts import Prompt


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


def free_colors(images: Tensor, prompts: Sequence[Prompt], detector: Detector, colors: Sequence[str]) -> Tensor:
    """Detected objects by color, ``[F, len(colors)]``, in the ``F`` pictures whose prompts name no color.

    Args:
        images: ``[N, 3, H, W]`` in [0, 1].
        prompts: ``N`` prompts with GenEval's metadata.
        detector: Finds the objects.
        colors: All colors.
    """
    named = [any("color" in clause for clause in prompt.metadata["include"]) for prompt in prompts]
    free = [i for i, name in enumerate(named) if not name]
    counts = torch.zeros(len(free), len(colors), dtype=torch.float64)
    if free:
        for row, objects in enumerate(detector.detect(images[free], [prompts[i] for i in free])):
            for found in objects:
                if found.color is not None:
                    counts[row, colors.index(found.color)] += 1
    return counts


def unevenness(counts: Tensor) -> Tensor:
    """Total variation distance of shares from equal shares, in [0, 1 - 1 / C].

    It is above 0 even for fair draws, as far as there are finitely many; 0 if nothing was counted.

    Args:
        counts: ``[..., N, C]``, summed over ``N``.
    """
    total = counts.sum(-2)
    count = total.sum(-1, keepdim=True)
    equal = torch.full_like(total, 1 / total.shape[-1])
    shares = torch.where(count > 0, total / count.clamp(min=1), equal)
    return (shares - equal).abs().sum(-1) / 2
