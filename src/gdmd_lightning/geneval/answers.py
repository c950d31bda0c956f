"""Models that answer GenEval 2's questions about pictures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.described import Described
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.pretrained import DTYPES, Precision, check_directory, is_local, load_pretrained
from gdmd_lightning.families.qwen_vl import chats, encoded, load_processor, patches, picture_features, text_inputs
from gdmd_lightning.families.sketch import sketch_auto
from gdmd_lightning.geneval.questions import Question
from gdmd_lightning.geneval.soft_tifa import answer_log_probability
from gdmd_lightning.locations import resolve
from gdmd_lightning.ranges import Count, ranged

TYPES = ("qwen3_vl", "qwen2_5_vl", "qwen2_vl")
"""Types of models in ``config.json``."""
Picture = tuple[Tensor, Tensor]
"""Features of a picture and its grid, see :func:`picture_features`."""


class Answers(Described, ABC):
    """Tells how probable the right answers to questions about pictures are.

    Attributes:
        differentiable: Whether the answers carry gradient to the pixels.
    """

    differentiable: bool = False

    @abstractmethod
    def log_probabilities(self, images: Tensor, questions: Sequence[Sequence[Question]]) -> list[Tensor]:
        """Log-probability of each right answer.

        Args:
            images: ``[B, 3, H, W]`` in [0, 1].
            questions: Those of each picture.

        Returns:
            ``[n]`` in float32 for each picture of ``n`` questions.
        """

    def prepare(self) -> None:
        """Load the model; called before training, so that nothing is missing later.

        Raises:
            UserError: If something is missing or broken.
        """

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""

    def sketch(self) -> nn.Module | None:
        """The model on the meta device, for memory planning; ``None`` if there is none."""
        return None


@ranged
class QwenVLAnswers(Answers):
    """Answers of a Qwen vision-language model, from the logits of its first token.

    Each question is a chat of its own: the picture, then ``QUESTION Answer in one word.`` A picture is encoded once for
    all of its questions.

    Source: facebookresearch/GenEval2, ``evaluation.py``.

    Args:
        path: Directory or hub id of the model with its processor; GenEval 2 uses ``Qwen/Qwen3-VL-8B-Instruct``.
        dtype: Precision of the weights; probabilities are float32.
        batch_size: Questions that the network sees at once.

    Raises:
        UserError: If the precision is unknown, or a local directory holds no such model.
    """

    differentiable = True

    def __init__(self, path: str, dtype: Precision = "bfloat16", batch_size: Count = 16) -> None:
        if dtype not in DTYPES:
            raise UserError(f"it is {dtype!r}", where="QwenVLAnswers.dtype", remedy=f"use {', '.join(DTYPES)}")
        self.where = "GenEval 2's answers"
        self.path, self.dtype, self.batch_size = resolve(str(path)), DTYPES[dtype], batch_size
        check_directory(self.path, self.where, "Qwen-VL", types=TYPES)
        self._processor: Any = load_processor(self.path, self.where) if is_local(self.path) else None
        self._network: Any = None
        self._device = torch.device("cpu")

    def prepare(self) -> None:
        self._model()

    def to(self, device: torch.device) -> None:
        self._device = device
        if self._network is not None:
            self._network.to(device)

    def sketch(self) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        return sketch_auto(AutoModelForImageTextToText, self.path).to(self.dtype)

    def log_probabilities(self, images: Tensor, questions: Sequence[Sequence[Question]]) -> list[Tensor]:
        network = self._model()
        pixels = images.to(self._device, torch.float32)
        asked = [(row, question) for row, mine in enumerate(questions) for question in mine]
        found: list[list[Tensor]] = [[] for _ in questions]
        pictures: dict[int, Picture] = {}
        for start in range(0, len(asked), self.batch_size):
            part = asked[start : start + self.batch_size]
            pictures = self._encode(network, pixels, [row for row, _ in part], pictures)
            logits = self._logits(network, [pictures[row] for row, _ in part], [question.text for _, question in part])
            for (row, question), mine in zip(part, logits, strict=True):
                found[row].append(answer_log_probability(mine, self.first_tokens(question)))
        return [torch.stack(each) for each in found]

    def first_tokens(self, question: Question) -> list[int]:
        """The first token of each spelling of the answer."""
        tokenizer = self._processor.tokenizer
        return [tokenizer.encode(spelling, add_special_tokens=False)[0] for spelling in question.spellings]

    def _encode(
        self, network: Any, pixels: Tensor, rows: Sequence[int], known: Mapping[int, Picture]
    ) -> dict[int, Picture]:
        """The pictures in these rows, encoded; the known ones are those of the batch before."""
        new = sorted(set(rows) - known.keys())
        out = {row: known[row] for row in known.keys() & set(rows)}
        if new:
            size = self._processor.image_processor.size
            low, high = size["shortest_edge"], size["longest_edge"]
            films, grid = patches(pixels[new], self._processor.image_processor, low, high)
            out |= zip(new, zip(picture_features(network.model.visual, films, grid), grid, strict=True), strict=True)
        return out

    def _logits(self, network: Any, pictures: Sequence[Picture], questions: Sequence[str]) -> Tensor:
        """Logits of the answers' first tokens, ``[B, vocabulary]``."""
        texts = chats(self._processor, [f"{question} Answer in one word." for question in questions])
        features, grids = (torch.stack(each) for each in zip(*pictures, strict=True))
        inputs = text_inputs(self._processor, texts, grids, "left", self.where)
        with encoded(network.model.visual, features):
            # Without patches the tower would not be asked.
            out = network(**inputs, pixel_values=features.new_zeros(0), use_cache=False, logits_to_keep=1)
        logits: Tensor = out.logits[:, -1]
        return logits

    def _model(self) -> Any:
        if self._network is None:
            from transformers import AutoModelForImageTextToText

            if self._processor is None:
                self._processor = load_processor(self.path, self.where)
            network = load_pretrained(AutoModelForImageTextToText, self.path, self.where, dtype=self.dtype)
            self._network = network.requires_grad_(False).eval().to(self._device)
        return self._network
