"""ImageReward, on the BLIP networks of transformers; the package ``image-reward`` is not needed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.preprocessing import center_crop, normalized
from gdmd_lightning.families.pretrained import AGAIN, is_local, load_any
from gdmd_lightning.locations import resolve
from gdmd_lightning.ranges import Count, ranged
from gdmd_lightning.rewards.heads import cast_but_head, regression_head
from gdmd_lightning.rewards.network import NetworkReward, Precision
from gdmd_lightning.rewards.weights import check_file, fill, find_file, read_weights

FILE = "ImageReward.pt"
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Mean and standard deviation of the raw score; source: THUDM/ImageReward, ``ImageReward.py``."""
LENGTH = 35
"""Tokens of a text; longer ones are cut."""
HEAD_WIDTH = 64
"""Width of an attention head, in both networks."""

RENAMED = (
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.", "vision.encoder.layers."),
    (r"^(vision\.encoder\.layers\.\d+)\.norm(\d)\.", r"\1.layer_norm\2."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.qkv\.", r"\1.self_attn.qkv."),
    (r"^(vision\.encoder\.layers\.\d+)\.attn\.proj\.", r"\1.self_attn.projection."),
)
"""From the names in ``ImageReward.pt`` to those of transformers."""
UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Heads of BLIP's own pretraining, and constants."""


@ranged
class ImageReward(NetworkReward):
    """Preference learned from experts' rankings, standardized: about 0 on average over its data.

    Source: 2304.05977; THUDM/ImageReward, ``ImageReward.py``.

    Args:
        path: ``ImageReward.pt``, its directory, or the hub id ``THUDM/ImageReward``. Sizes are read from the weights.
        tokenizer: Directory or hub id of the ``BertTokenizer``: ``bert-base-uncased``.
        name: Name in logs.
        dtype: Precision of the two transformers' weights; the head stays in float32.
        batch_size: Pictures that the network sees at once.

    Raises:
        UserError: If the weights or the tokenizer are missing or broken, or the weights are those of another network.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str,
        name: str = "image_reward",
        dtype: Precision = "float32",
        batch_size: Count = 32,
    ) -> None:
        super().__init__(path, name, dtype, batch_size)
        self.tokenizer = resolve(str(tokenizer))
        self._tokenizer: Any = None
        check_file(self.path, FILE, self.where)
        if is_local(self.tokenizer):
            self._tokenizer = self._loaded_tokenizer()

    def load(self) -> nn.Module:
        file = find_file(self.path, FILE, self.where)
        weights = renamed(read_weights(file, self.where))
        network = build(weights, self.where, str(file))
        fill(network, weights, self.where, str(file))
        if self._tokenizer is None:
            self._tokenizer = self._loaded_tokenizer()
        return network

    def cast(self, network: Any) -> nn.Module:
        return cast_but_head(network, self.dtype)

    def sketch(self) -> nn.Module:
        with torch.device("meta"):
            if not is_local(self.path):
                return self.cast(build(published_sizes(), self.where, self.path))
            file = find_file(self.path, FILE, self.where)
            return self.cast(build(renamed(read_weights(file, self.where)), self.where, str(file)))

    def judge(self, network: Any, images: Tensor, texts: list[str]) -> Tensor:
        pixels = normalized(center_crop(images, network["vision"].config.image_size)).to(self.dtype)
        patches = network["vision"](pixels).last_hidden_state
        options = {"padding": "max_length", "truncation": True, "max_length": LENGTH, "return_tensors": "pt"}
        tokens = self._tokenizer(texts, **options).to(pixels.device)
        read = network["text"](
            tokens.input_ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=pixels.device),
        ).last_hidden_state
        scores: Tensor = (network["head"](read[:, 0].float())[:, 0] - MEAN) / STD
        return scores

    def _loaded_tokenizer(self) -> Any:
        from transformers import BertTokenizer

        return load_any(BertTokenizer, self.tokenizer, self.where)


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The published weights by the names of :func:`build`'s network."""
    found = {}
    for key, value in weights.items():
        if not key.startswith(UNUSED):
            for pattern, name in RENAMED:
                key = re.sub(pattern, name, key)
            found[key] = value
    return found


def build(weights: Mapping[str, Tensor], where: str, source: str) -> nn.Module:
    """Vision transformer, cross-attending text encoder and head of the sizes that the weights have, unfilled.

    Raises:
        UserError: If a weight that tells a size is missing, or tells an impossible one.
    """
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    def shape(name: str, dimensions: int, width: int | None = None) -> tuple[int, ...]:
        """The shape of a weight; its dimension ``width`` is one of attention heads."""
        if name not in weights:
            raise UserError(f"{source!r} has no weight {name!r}", where=where, remedy=AGAIN)
        found = tuple(weights[name].shape)
        if len(found) != dimensions or 0 in found or (width is not None and found[width] % HEAD_WIDTH):
            what = f"the weights in {source!r} are not those of ImageReward: {name!r} is of shape {found}"
            raise UserError(what, where=where, remedy=AGAIN)
        return found

    patch = shape("vision.embeddings.patch_embedding.weight", 4, width=0)
    words, width = shape("text.embeddings.word_embeddings.weight", 2, width=1)
    vision = BlipVisionConfig(
        hidden_size=patch[0],
        intermediate_size=shape("vision.encoder.layers.0.mlp.fc1.bias", 1)[0],
        num_hidden_layers=_count(weights, "vision.encoder.layers."),
        num_attention_heads=patch[0] // HEAD_WIDTH,
        image_size=patch[-1] * isqrt(shape("vision.embeddings.position_embedding", 3)[1] - 1),
        patch_size=patch[-1],
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=width,
        encoder_hidden_size=patch[0],
        intermediate_size=shape("text.encoder.layer.0.intermediate.dense.bias", 1)[0],
        num_hidden_layers=_count(weights, "text.encoder.layer."),
        num_attention_heads=width // HEAD_WIDTH,
        max_position_embeddings=shape("text.embeddings.position_embeddings.weight", 2)[0],
        layer_norm_eps=1e-12,
        is_decoder=True,  # builds the attention to the picture; the mask stays that of an encoder
    )
    parts = {
        "vision": BlipVisionModel(vision),
        "text": BlipTextModel(text, add_pooling_layer=False),
        "head": regression_head(width),
    }
    return nn.ModuleDict(parts)


def published_sizes() -> dict[str, Tensor]:
    """Empty weights that tell the sizes of the published network: ViT-L/16 and BERT-base."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    layers = {f"vision.encoder.layers.{i}.mlp.fc1.bias": empty(4096) for i in range(24)}
    layers |= {f"text.encoder.layer.{i}.intermediate.dense.bias": empty(3072) for i in range(12)}
    return {
        **layers,
        "vision.embeddings.patch_embedding.weight": empty(1024, 3, 16, 16),
        "vision.embeddings.position_embedding": empty(1, 197, 1024),
        "text.embeddings.word_embeddings.weight": empty(30524, 768),
        "text.embeddings.position_embeddings.weight": empty(512, 768),
    }


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    return len({key.removeprefix(prefix).split(".")[0] for key in weights if key.startswith(prefix)})
