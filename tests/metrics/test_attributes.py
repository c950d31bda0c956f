"""What prompts leave open is counted by color, cell and size; what they name is not."""

import torch

from gdmd_lightning.geneval.rules import Detection
from gdmd_lightning.metrics.attributes import free_choices
from gdmd_lightning.prompts import Prompt

FREE = {"include": [{"class": "circle"}]}
RED = {"include": [{"class": "circle", "color": "red"}]}
LEFT = {"include": [{"class": "circle"}, {"class": "square", "position": ["left of", 0]}]}


class Found:
    """Finds what it is told, whatever the pictures show."""

    def __init__(self, *found: list[Detection]) -> None:
        self.found = list(found)

    def detect(self, images, prompts):
        return self.found


def test_free_choices_counts_what_each_prompt_leaves_open():
    small = Detection("circle", (0, 0, 6, 8), 1.0, "red")  # a mean side of 7 in 32 pixels: 0.22
    low = Detection("square", (26, 12, 38, 22), 1.0, "blue")  # its center is at the right edge, 17 down
    plain = Detection("circle", (12, 24, 22, 32), 1.0, None)
    images = torch.zeros(4, 3, 32, 32)
    prompts = [Prompt("", each) for each in (FREE, RED, LEFT, FREE)]
    found = free_choices(images, prompts, Found([small, low], [small], [low], [plain]), ["red", "blue"])
    assert found.color.tolist() == [[1, 1], [0, 1], [0, 0]]  # the second names a color
    cells = [[i for i, n in enumerate(row) if n] for row in found.position.tolist()]
    assert cells == [[0, 5], [0], [7]]  # the third names a position
    sizes = [[i for i, n in enumerate(row) if n] for row in found.size.tolist()]
    assert sizes == [[0, 2], [0], [2], [1]]
