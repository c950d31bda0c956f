"""LAION's aesthetic predictor: how much people like a picture, whatever its prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gdmd_lightning.families.preprocessing import center_crop, normalized
from gdmd_lightning.families.pretrained import check_directory, load_pretrained
from gdmd_lightning.families.sketch import sketch_model
from gdmd_lightning.locations import resolve
from gdmd_lightning.ranges import Count, ranged
from gdmd_lightning.rewards.heads import cast_but_head, regression_head
from gdmd_lightning.rewards.network import NetworkReward, Precision
from gdmd_lightning.rewards.weights import check_file, fill, find_file, read_weights

HEAD = "sac+logos+ava1-l14-linearMSE.pth"


@ranged
class AestheticScore(NetworkReward):
    """Predicted rating from 1 to 10, about 5.6: a regression on the unit image embedding of CLIP ViT-L/14.

    Source: christophschuhmann/improved-aesthetic-predictor.

    Args:
        path: Directory or hub id of the ``CLIPModel``: ``openai/clip-vit-large-patch14``.
        head: The head's weights, ``sac+logos+ava1-l14-linearMSE.pth``, or their directory.
        name: Name in logs.
        dtype: Precision of CLIP's weights; the head stays in float32.
        batch_size: Pictures that the network sees at once.

    Raises:
        UserError: If the weights are missing, broken, or those of another network.
    """

    def __init__(
        self, path: str, head: str, name: str = "aesthetic", dtype: Precision = "float32", batch_size: Count = 32
    ) -> None:
        super().__init__(path, name, dtype, batch_size)
        self.head = resolve(str(head))
        check_directory(self.path, self.where, "CLIPModel")
        check_file(self.head, HEAD, self.where)

    def load(self) -> nn.Module:
        from transformers import CLIPModel

        clip = load_pretrained(CLIPModel, self.path, self.where)
        head = regression_head(clip.config.projection_dim)
        file = find_file(self.head, HEAD, self.where)
        weights = {key.removeprefix("layers."): value for key, value in read_weights(file, self.where).items()}
        fill(head, weights, self.where, str(file))
        return nn.ModuleDict({"clip": _without_texts(clip), "head": head})

    def cast(self, network: Any) -> nn.Module:
        return cast_but_head(network, self.dtype)

    def sketch(self) -> nn.Module:
        from transformers import CLIPModel

        clip: Any = sketch_model(CLIPModel, self.path)
        with torch.device("meta"):
            head = regression_head(clip.config.projection_dim)
        return self.cast(nn.ModuleDict({"clip": _without_texts(clip), "head": head}))

    def judge(self, network: Any, images: Tensor, texts: list[str]) -> Tensor:
        clip, head = network["clip"], network["head"]
        pixels = normalized(center_crop(images, clip.config.vision_config.image_size)).to(self.dtype)
        embedding = F.normalize(clip.get_image_features(pixels).pooler_output.float(), dim=-1)
        scores: Tensor = head(embedding)[:, 0]
        return scores


def _without_texts(clip: Any) -> nn.Module:
    del clip.text_model
    network: nn.Module = clip
    return network
