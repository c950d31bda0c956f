"""Whether a picture shows the text that its prompt asks for, read by an OCR network."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward
from gdmd_lightning.rewards.network import check_pictures

QUOTED = re.compile(r'"([^"]+)"|“([^”]+)”')


class OCRReward(Reward):
    """``1 - distance / length`` of the wanted text and what is read, in [0, 1]; 1 if the picture contains the text.

    The distance is Levenshtein's, in letters, without spaces and case, and at most the length. The wanted text is the
    prompt's metadata ``text``, or what stands in double quotes in the prompt if there is none or it is the prompt. The
    OCR is that of the package ``rapidocr``, whose wheel carries the networks (PP-OCR, Apache 2.0); it runs on the CPU.

    Source: TextDiffuser's accuracy as 2505.05470 (Flow-GRPO) rewards it.

    Args:
        name: Name in logs.

    Raises:
        UserError: If ``rapidocr`` is not installed.
    """

    def __init__(self, name: str = "ocr") -> None:
        self.name = name
        self._reader: Any = None
        try:
            import onnxruntime  # noqa: F401
            import rapidocr  # noqa: F401
        except ImportError as error:
            remedy = "pip install 'gdmd-lightning[rewards]'"
            raise UserError(f"{error.name} is not installed", where=f"reward {name!r}", remedy=remedy) from error

    def check(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not letters(wanted(prompt)):
                raise UserError(
                    f"prompt {prompt.text[:80]!r} asks for no text",
                    where=f"reward {self.name!r}",
                    remedy="put the text in double quotes, or give the metadata 'text'",
                )

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        check_pictures(images, [prompt.text for prompt in prompts], f"reward {self.name!r}")
        self.check(prompts)
        pictures = (images.detach().cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
        found = [
            similarity(wanted(prompt), self.read(picture)) for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return torch.tensor(found, dtype=torch.float32)

    def read(self, picture: Any) -> str:
        """The text in a picture, an array ``[H, W, 3]`` of 8 bits in RGB: all lines from top to bottom."""
        if self._reader is None:
            from rapidocr import RapidOCR

            self._reader = RapidOCR(params={"Global.log_level": "critical"})
        # OpenCV's order of channels
        return " ".join(self._reader(picture[..., ::-1]).txts or ())


def wanted(prompt: Prompt) -> str:
    """The text that a picture should show; empty if the prompt names none."""
    text = prompt.metadata.get("text")
    # A row read with `column: text` is metadata as a whole, with the prompt under that key; so is what `sample` lists.
    if isinstance(text, str) and text != prompt.text:
        return text
    quoted = QUOTED.search(prompt.text)
    return next(filter(None, quoted.groups())) if quoted else ""


def letters(text: str) -> str:
    """The text without spaces, in lower case."""
    return "".join(text.split()).lower()


def similarity(target: str, found: str) -> float:
    """``1 - distance / length`` in letters, in [0, 1]; 1 if ``found`` contains ``target``."""
    from torchmetrics.functional.text import edit_distance

    target, found = letters(target), letters(found)
    if target in found:
        return 1.0
    return 1 - min(int(edit_distance(found, target, reduction="sum")), len(target)) / len(target)
