"""Zero-shot classification of an object's color by CLIP, as in GenEval.

Source: djghosh13/geneval, ``evaluate_images.py``; zero-shot classifier of clip_benchmark.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd_lightning.described import Described
from gdmd_lightning.families.preprocessing import center_crop, normalized
from gdmd_lightning.families.pretrained import DTYPES, Precision, check_directory, load_any, load_pretrained
from gdmd_lightning.families.sketch import sketch_model
from gdmd_lightning.geneval.classes import COLORS
from gdmd_lightning.locations import resolve

TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
GRAY = 0x99 / 255
"""Every pixel outside the object's mask."""


class ColorClassifier(Described):
    """Names the color of objects.

    Args:
        path: Directory or hub id of a ``CLIPModel`` with its tokenizer; GenEval's is ``openai/clip-vit-large-patch14``.
        dtype: Precision of the weights; similarities are float32.

    Raises:
        UserError: If a local directory holds no CLIP model.
    """

    def __init__(self, path: str, dtype: Precision = "float32") -> None:
        self.where = "GenEval's color classifier"
        self.path, self.dtype = resolve(str(path)), DTYPES[dtype]
        check_directory(self.path, self.where, "CLIPModel")
        self._loaded: tuple[Any, Any] | None = None
        self._device = torch.device("cpu")
        self._classifiers: dict[str, Tensor] = {}

    def prepare(self) -> None:
        """Load the model."""
        self._model()

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        self._device = device
        self._classifiers = {name: classifier.to(device) for name, classifier in self._classifiers.items()}
        if self._loaded:
            self._loaded[0].to(device)

    def sketch(self) -> nn.Module:
        """The model on the meta device."""
        from transformers import CLIPModel

        return sketch_model(CLIPModel, self.path).to(self.dtype)

    @torch.no_grad()
    def classify(self, image: Tensor, boxes: list[tuple[int, int, int, int]], masks: Tensor, name: str) -> list[str]:
        """The color of each object of one class in a picture.

        Args:
            image: ``[3, H, W]`` in [0, 1].
            boxes: Left, top, right and bottom edge in pixels, ``K`` of them.
            masks: Which pixels show the object, ``[K, H, W]``, boolean.
            name: Class of the objects.
        """
        model, _ = self._model()
        size = model.config.vision_config.image_size
        crops = [crop(image, box, mask, size) for box, mask in zip(boxes, masks, strict=True)]
        pixels = normalized(torch.cat(crops).to(self._device)).to(self.dtype)
        features = model.get_image_features(pixels).pooler_output
        similarity = F.normalize(features.float(), dim=-1) @ self.classifier(name).T
        return [COLORS[index] for index in similarity.argmax(1).tolist()]

    @torch.no_grad()
    def classifier(self, name: str) -> Tensor:
        """Unit vector of each color of a class: the mean of its templates' unit vectors, ``[10, D]``."""
        if name not in self._classifiers:
            model, tokenizer = self._model()
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").to(self._device)
            features = F.normalize(model.get_text_features(**tokens).pooler_output.float(), dim=-1)
            mean = features.unflatten(0, (len(COLORS), len(TEMPLATES))).mean(1)
            self._classifiers[name] = F.normalize(mean, dim=-1)
        return self._classifiers[name]

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import CLIPModel, CLIPTokenizer

            model = load_pretrained(CLIPModel, self.path, self.where).to(self._device, self.dtype)
            self._loaded = model.requires_grad_(False).eval(), load_any(CLIPTokenizer, self.path, self.where)
        return self._loaded


def crop(image: Tensor, box: tuple[int, int, int, int], mask: Tensor, size: int) -> Tensor:
    """The middle of an object on gray, cut to its box, ``[1, 3, size, size]``.

    Args:
        image: ``[3, H, W]`` in [0, 1].
        box: Left, top, right and bottom edge in pixels.
        mask: ``[H, W]``, boolean.
        size: Side of the result in pixels.
    """
    left, top, right, bottom = box
    alone = torch.where(mask, image, GRAY)[:, top:bottom, left:right]
    return center_crop(alone[None], size)
