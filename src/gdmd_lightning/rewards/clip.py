"""Contrastive text-image score of any ``CLIPModel`` directory; stands in for HPS in the Shapes world."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.hub import loading_problem
from gdmd_lightning.families.sketch import sketch_model
from gdmd_lightning.locations import resolve
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Finite, Positive, ranged
from gdmd_lightning.rewards.base import Reward


@ranged
class ContrastiveReward(Reward):
    """Cosine of text and picture under a CLIP model, differentiable in the pixels.

    Args:
        path: Directory, ``package:`` path or hub id of a ``CLIPModel`` with its ``CLIPTokenizer``.
        mean, std: Mean and standard deviation of pixels, per channel; the Shapes scorer uses 0.5.
        name: Name in logs.

    Raises:
        UserError: If a local directory has no ``config.json``, its files do not load, or they do not hold exactly the
            model's weights.
    """

    differentiable = True

    def __init__(
        self,
        path: str,
        mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5),
        std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5),
        name: str = "contrastive",
    ) -> None:
        self.path, self.name = resolve(str(path)), name
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)
        local = Path(self.path).is_absolute() or Path(self.path).exists()
        if local and not (Path(self.path) / "config.json").is_file():
            raise UserError(
                f"{self.path!r} has no config.json", where=f"reward {name!r}", remedy="give a CLIPModel directory"
            )
        self._loaded: tuple[Any, Any] | None = None
        self._device = torch.device("cpu")

    def to(self, device: torch.device) -> None:
        self._device = device
        self.mean, self.std = self.mean.to(device), self.std.to(device)
        if self._loaded:
            self._loaded[0].to(device)

    def sketch(self) -> nn.Module:
        from transformers import CLIPModel

        return sketch_model(CLIPModel, self.path)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        model, tokenizer = self._model()
        tokens = tokenizer([p.text for p in prompts], padding="max_length", truncation=True, return_tensors="pt")
        size = model.config.vision_config.image_size
        pixels = images.to(self._device)  # a reward on the CPU gets pictures from the accelerator
        if images.shape[-2:] != (size, size):
            pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
        pixels = (pixels - self.mean[:, None, None]) / self.std[:, None, None]
        with torch.no_grad():
            texts = model.get_text_features(tokens.input_ids.to(pixels.device)).pooler_output
        pictures = model.get_image_features(pixels).pooler_output
        return F.cosine_similarity(pictures, texts, dim=-1).float()

    def _model(self) -> tuple[Any, Any]:
        if self._loaded is None:
            from transformers import CLIPModel, CLIPTokenizer

            try:
                model, report = CLIPModel.from_pretrained(
                    self.path, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
                tokenizer = CLIPTokenizer.from_pretrained(self.path)
            except Exception as error:  # transformers and safetensors raise a dozen unrelated types here
                problem, remedy = loading_problem(self.path, error)
                raise UserError(f"{self.path!r} {problem}", where=f"reward {self.name!r}", remedy=remedy) from error
            self._check_complete(report)
            self._loaded = model.requires_grad_(False).eval().to(self._device), tokenizer
        return self._loaded

    def _check_complete(self, report: dict[str, Any]) -> None:
        """Fail if the files do not hold exactly the model's weights; transformers would draw the others at random.

        Raises:
            UserError: The message names the first weight and the number of them.
        """
        for kind in ("missing", "mismatched", "unexpected"):
            if keys := sorted(map(str, report[f"{kind}_keys"])):
                raise UserError(
                    f"the weights in {self.path!r} are not those of its config.json: "
                    f"{len(keys)} {kind}, the first {keys[0]}",
                    where=f"reward {self.name!r}",
                    remedy="save or download it again",
                )
