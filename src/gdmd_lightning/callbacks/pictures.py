"""Images side by side, with the prompt under each."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture_grid(rows: dict[str, Tensor], texts: list[str]) -> Figure:
    """Draw one row of images per generator.

    Args:
        rows: Images ``[N, 3, H, W]`` in [0, 1] by generator name; the images of a column share their noise.
        texts: The ``N`` prompts, written under the last row.
    """
    from matplotlib.figure import Figure

    columns = len(texts)
    figure = Figure(figsize=(1.15 * columns + 0.9, 1.15 * len(rows) + 0.7), dpi=110)
    for r, (name, images) in enumerate(rows.items()):
        for c in range(columns):
            axes = figure.add_subplot(len(rows), columns, r * columns + c + 1)
            axes.imshow(images[c].permute(1, 2, 0).float().cpu().numpy(), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            if c == 0:
                axes.set_ylabel(name, fontsize=8)
            if r == len(rows) - 1:
                axes.set_xlabel("\n".join(textwrap.wrap(texts[c], 16)), fontsize=7)
    figure.tight_layout(pad=0.4)
    return figure
