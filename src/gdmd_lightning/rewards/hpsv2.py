"""Human Preference Score v2 and v2.1."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.preprocessing import normalized, pad_square
from gdmd_lightning.ranges import Count, ranged
from gdmd_lightning.rewards.network import NetworkReward, Precision, distinct
from gdmd_lightning.rewards.weights import check_file, fill, find_file, read_weights

FILES = {"v2": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}


@ranged
class HPSv2(NetworkReward):
    """Cosine of text and picture under a CLIP ViT-H/14 that was trained on people's choices; about 0.28.

    Source: 2306.09341; tgxs002/HPSv2, ``img_score.py``, without its automatic mixed precision.

    Args:
        path: The weights, their directory, or the hub id ``xswu/HPSv2``.
        version: Which of the two files a directory or hub id is asked for.
        name: Name in logs.
        architecture: Name of the network in open_clip.
        dtype: Precision of the weights.
        batch_size: Pictures that the network sees at once.

    Raises:
        UserError: If open_clip is not installed, the version or network is unknown, or the weights are missing, broken,
            or those of another network.
    """

    def __init__(
        self,
        path: str,
        version: Literal["v2", "v2.1"] = "v2.1",
        name: str = "hpsv2",
        architecture: str = "ViT-H-14",
        dtype: Precision = "float32",
        batch_size: Count = 32,
    ) -> None:
        super().__init__(path, name, dtype, batch_size)
        if version not in FILES:
            raise UserError(f"it is {version!r}", where="HPSv2.version", remedy=f"use {' or '.join(FILES)}")
        self.file, self.architecture = FILES[version], architecture
        self._tokenizer: Any = None
        if _open_clip(self.where).get_model_config(architecture) is None:
            remedy = "use one of open_clip.list_models(), such as ViT-H-14"
            raise UserError(f"it is {architecture!r}", where="HPSv2.architecture", remedy=remedy)
        check_file(self.path, self.file, self.where)

    def load(self) -> nn.Module:
        network = self._built()
        file = find_file(self.path, self.file, self.where)
        fill(network, read_weights(file, self.where), self.where, str(file))
        self._tokenizer = _open_clip(self.where).get_tokenizer(self.architecture)
        return network

    def sketch(self) -> nn.Module:
        with torch.device("meta"):
            return self._built().to(self.dtype)

    def judge(self, network: Any, images: Tensor, texts: list[str]) -> Tensor:
        pixels = normalized(pad_square(images, network.visual.image_size[0])).to(self.dtype)
        pictures = network.encode_image(pixels, normalize=True).float()
        each, numbers = distinct(texts)
        tokens = self._tokenizer(each).to(pixels.device)
        # In bfloat16 on a CPU torch copies the weights for each text of a batch: 17 times as slow as one by one.
        size = 1 if (pixels.device.type, pixels.dtype) == ("cpu", torch.bfloat16) else len(tokens)
        with torch.no_grad():
            words = torch.cat([network.encode_text(part, normalize=True).float() for part in tokens.split(size)])
        return (pictures * words[numbers]).sum(-1)

    def _built(self) -> nn.Module:
        library = _open_clip(self.where)
        # Not create_model, which warns that it loads no weights and cannot build on the meta device.
        network: nn.Module = library.CLIP(**library.get_model_config(self.architecture))
        return network


def _open_clip(where: str) -> Any:
    try:
        import open_clip
    except ImportError as error:
        remedy = "pip install 'gdmd-lightning[rewards]'"
        raise UserError("open_clip is not installed", where=where, remedy=remedy) from error
    return open_clip
