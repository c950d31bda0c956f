"""Contrastive text-image scores of any ``CLIPModel``: the Shapes scorer, CLIPScore and PickScore."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd_lightning.families.preprocessing import CLIP_MEAN, CLIP_STD, center_crop, normalized
from gdmd_lightning.families.pretrained import check_directory, load_any, load_pretrained
from gdmd_lightning.families.sketch import sketch_model
from gdmd_lightning.locations import resolve
from gdmd_lightning.ranges import Count, Finite, Positive, ranged
from gdmd_lightning.rewards.network import NetworkReward, Precision, distinct


@ranged
class ContrastiveReward(NetworkReward):
    """Cosine of text and picture under a CLIP model; stands in for HPS in the Shapes world.

    Args:
        path: Directory, ``package:`` path or hub id of a ``CLIPModel`` with its ``CLIPTokenizer``.
        mean, std: Mean and standard deviation of pixels, per channel; the Shapes scorer uses 0.5.
        name: Name in logs.
        dtype: Precision of the weights.
        batch_size: Pictures that the network sees at once.

    Raises:
        UserError: If a local directory has no ``config.json``, its files do not load, or they do not hold exactly the
            model's weights.
    """

    def __init__(
        self,
        path: str,
        mean: tuple[Finite, Finite, Finite] = (0.5, 0.5, 0.5),
        std: tuple[Positive, Positive, Positive] = (0.5, 0.5, 0.5),
        name: str = "contrastive",
        dtype: Precision = "float32",
        batch_size: Count = 32,
    ) -> None:
        super().__init__(path, name, dtype, batch_size)
        self.mean, self.std, self.tokenizer = mean, std, self.path
        self._tokenizer: Any = None
        check_directory(self.path, self.where, "CLIPModel")

    def load(self) -> nn.Module:
        from transformers import CLIPModel, CLIPTokenizer

        network: nn.Module = load_pretrained(CLIPModel, self.path, self.where)
        self._tokenizer = load_any(CLIPTokenizer, self.tokenizer, self.where)
        return network

    def sketch(self) -> nn.Module:
        from transformers import CLIPModel

        return sketch_model(CLIPModel, self.path).to(self.dtype)

    def judge(self, network: Any, images: Tensor, texts: list[str]) -> Tensor:
        size = network.config.vision_config.image_size
        pixels = normalized(center_crop(images, size), self.mean, self.std).to(network.dtype)
        pictures = network.get_image_features(pixels).pooler_output.float()
        each, numbers = distinct(texts)
        # No longer than the longest: the text is read from left to right up to its end, and padding changes nothing.
        tokens = self._tokenizer(each, padding=True, truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            words = network.get_text_features(tokens.to(pixels.device)).pooler_output.float()
        return F.cosine_similarity(pictures, words[numbers], dim=-1)


@ranged
class CLIPScore(ContrastiveReward):
    """Cosine of text and picture under CLIP; about 0.3 for a fitting picture of ViT-L/14.

    Source: 2104.08718, without its factor 2.5 and its floor at 0, as the papers' tables report it.

    Args:
        path: Directory or hub id of a ``CLIPModel``; the papers use ``openai/clip-vit-large-patch14``.
        name: Name in logs.
        dtype: Precision of the weights.
        batch_size: Pictures that the network sees at once.
    """

    def __init__(
        self, path: str, name: str = "clip_score", dtype: Precision = "float32", batch_size: Count = 32
    ) -> None:
        super().__init__(path, CLIP_MEAN, CLIP_STD, name, dtype, batch_size)


@ranged
class PickScore(CLIPScore):
    """Preference of the users of Pick-a-Pic: ``exp(logit_scale) cosine``, about 22.

    Source: 2305.01569, equation 1.

    Args:
        path: Directory or hub id of its ``CLIPModel``: ``yuvalkirstain/PickScore_v1``.
        tokenizer: Directory or hub id of its ``CLIPTokenizer``, which the model's own repository does not hold:
            ``laion/CLIP-ViT-H-14-laion2B-s32B-b79K``; by default ``path``.
        name: Name in logs.
        dtype: Precision of the weights.
        batch_size: Pictures that the network sees at once.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None = None,
        name: str = "pickscore",
        dtype: Precision = "float32",
        batch_size: Count = 32,
    ) -> None:
        super().__init__(path, name, dtype, batch_size)
        self.tokenizer = self.path if tokenizer is None else resolve(str(tokenizer))

    def judge(self, network: Any, images: Tensor, texts: list[str]) -> Tensor:
        return super().judge(network, images, texts) * network.logit_scale.float().exp()
