"""Rewards that a frozen network computes: loaded when first needed, in parts, on any device and in any precision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.pretrained import DTYPES, Precision
from gdmd_lightning.locations import resolve
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.ranges import Count, ranged
from gdmd_lightning.rewards.base import Reward


@ranged
class NetworkReward(Reward):
    """Base of rewards with a network; a new one gives :meth:`load` and :meth:`judge`.

    Args:
        path: Where its weights are: a file or directory, a ``package:`` path, or a hub id, which is downloaded.
        name: Name in logs.
        dtype: Precision of the weights; scores are float32.
        batch_size: Pictures that the network sees at once.

    Raises:
        UserError: If the precision is unknown.
    """

    differentiable = True

    def __init__(self, path: str, name: str, dtype: Precision = "float32", batch_size: Count = 32) -> None:
        if dtype not in DTYPES:
            raise UserError(f"it is {dtype!r}", where=f"{type(self).__name__}.dtype", remedy=f"use {', '.join(DTYPES)}")
        self.path, self.name, self.dtype, self.batch_size = resolve(str(path)), name, DTYPES[dtype], batch_size
        self._network: nn.Module | None = None
        self._device = torch.device("cpu")

    @abstractmethod
    def load(self) -> nn.Module:
        """The network on the CPU in float32, with its weights.

        Raises:
            UserError: If they are missing, broken, or those of another network.
        """

    @abstractmethod
    def judge(self, network: nn.Module, images: Tensor, texts: list[str]) -> Tensor:
        """Score at most ``batch_size`` pictures ``[B, 3, H, W]`` in [0, 1] on the network's device: ``[B]``."""

    @property
    def where(self) -> str:
        """This reward in messages."""
        return f"reward {self.name!r}"

    @property
    def network(self) -> nn.Module:
        """The frozen network; the first use loads it."""
        if self._network is None:
            self._network = self.cast(self.load()).requires_grad_(False).eval().to(self._device)
        return self._network

    def cast(self, network: nn.Module) -> nn.Module:
        """The network in the precision that was asked for; override it to keep a part in another one."""
        return network.to(self.dtype)

    def prepare(self) -> None:
        _ = self.network

    def to(self, device: torch.device) -> None:
        self._device = device
        if self._network is not None:
            self._network.to(device)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        check_pictures(images, texts, self.where)
        network = self.network
        pixels = images.to(self._device, torch.float32)  # a reward on the CPU gets pictures from the accelerator
        parts = zip(pixels.split(self.batch_size), _split(texts, self.batch_size), strict=True)
        return torch.cat([self.judge(network, part, mine).float() for part, mine in parts])


TOLERANCE = 1e-3
"""How far pixels may be out of [0, 1]; a rounding error is none of the user's."""


def check_pictures(images: Tensor, texts: Sequence[str], where: str) -> None:
    """Check what a scorer is given; waits for the device. Pixels that are not finite are left to the judge.

    Raises:
        UserError: If there is no picture, not one prompt for each, or they are no ``[B, 3, H, W]`` of floats in [0, 1].
    """
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise UserError(
            f"pictures are {str(images.dtype).removeprefix('torch.')} of shape {tuple(images.shape)}",
            where=where,
            remedy="give floats of shape (B, 3, H, W) in [0, 1]",
        )
    if not len(images) or len(images) != len(texts):
        raise UserError(
            f"{len(images)} pictures and {len(texts)} prompts", where=where, remedy="give one prompt for each picture"
        )
    low, high = images.detach().flatten(1).aminmax(dim=1)
    outside = (low < -TOLERANCE) | (high > 1 + TOLERANCE)
    if bool(outside.any()):
        raise UserError(
            f"{int(outside.sum())} of {len(images)} pictures are out of range: {low.min().item():.4g} to "
            f"{high.max().item():.4g}, the first with prompt {texts[int(outside.nonzero()[0])]!r}",
            where=where,
            remedy="give pixels in [0, 1]",
        )


def distinct(texts: Sequence[str]) -> tuple[list[str], list[int]]:
    """Each text once, and for every text its number among them: samples of one prompt share its embedding."""
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return list(numbers), [numbers[text] for text in texts]


def _split(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]
