"""The interface of rewards, and the check of every score before it is used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from gdmd_lightning.described import Described
from gdmd_lightning.errors import UserError
from gdmd_lightning.families.pictures import NonFinitePictures, not_finite
from gdmd_lightning.prompts import Prompt


class Reward(Described, ABC):
    """Scores pictures.

    Attributes:
        name: Name in logs.
        differentiable: Whether ``score`` carries gradient to the pixels.
    """

    name: str = "reward"
    differentiable: bool = False

    @abstractmethod
    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Score pictures ``[B, 3, H, W]`` in [0, 1]; returns ``[B]`` in float32."""

    @property
    def parts(self) -> tuple[tuple[Reward, float], ...]:
        """The rewards that this one is the weighted sum of, each with its weight; itself if it is no sum."""
        return ((self, 1.0),)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Check that the prompts contain what the reward needs.

        Raises:
            UserError: If a prompt lacks it.
        """

    def prepare(self) -> None:
        """Load what the reward needs; called before training, so that nothing is missing later.

        Raises:
            UserError: If something is missing or broken.
        """

    def to(self, device: torch.device) -> None:
        """Move the reward's model to a device."""

    def sketch(self) -> nn.Module | None:
        """The reward's model on the meta device, for memory planning; ``None`` if it has none."""
        return None


def checked_score(
    reward: Reward,
    images: Tensor,
    prompts: Sequence[Prompt],
    score: Callable[[Tensor, Sequence[Prompt]], Tensor] | None = None,
) -> Tensor:
    """``reward.score``, checked: ``[B]`` finite float32 on the pictures' device.

    Args:
        reward: The reward.
        images: ``[B, 3, H, W]`` in [0, 1].
        prompts: Those of the pictures.
        score: What to call instead, for a caller that keeps more than the scores.

    Raises:
        NonFinitePictures: If a picture is not finite, whatever the reward makes of it.
        UserError: If the reward raises, returns another shape or a value that is not finite, or has no gradient
            although it is differentiable and the pictures have one.
    """
    where = f"reward {reward.name!r}"
    broken = not_finite(images)
    texts = [prompt.text for prompt in prompts]
    try:
        scores = (score or reward.score)(images, prompts)
    except Exception as error:  # a user's reward may raise anything
        if bool(broken.any()):
            raise NonFinitePictures(broken, texts) from error
        if isinstance(error, UserError):
            raise
        raise UserError(f"raised {type(error).__name__}: {error}", where=where) from error
    shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    if shape != (len(images),):
        raise UserError(
            f"returned {shape} for {len(images)} pictures",
            where=where,
            remedy=f"return a tensor of shape ({len(images)},)",
        )
    if reward.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        raise UserError(
            "differentiable is true, but its scores carry no gradient to the pictures",
            where=where,
            remedy="compute them from the pictures with torch, or set differentiable to false",
        )
    _check_finite(scores.detach().to(images.device), broken, texts, where)
    return scores.to(images.device, torch.float32)


def _check_finite(scores: Tensor, broken: Tensor, texts: Sequence[str], where: str) -> None:
    """Fail if a picture (``broken``) or a score is not finite, with one wait for the device for both."""
    wrong = ~torch.isfinite(scores)
    if not bool((broken | wrong).any()):
        return
    if bool(broken.any()):
        raise NonFinitePictures(broken, texts)
    first = int(wrong.nonzero()[0])
    raise UserError(
        f"returned {scores[first].item()} for {int(wrong.sum())} of {len(texts)} pictures, "
        f"the first with prompt {texts[first]!r}",
        where=where,
        remedy="return finite scores",
    )


class _AbsentReward(Reward):
    """Stands in for the reward of a module that is restored only to generate; it scores nothing.

    Args:
        name: Name of the reward that it stands for.
    """

    differentiable = True

    def __init__(self, name: str = "unknown") -> None:
        self.name = name

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise UserError("the module was restored without its reward", where=f"reward {self.name!r}")
