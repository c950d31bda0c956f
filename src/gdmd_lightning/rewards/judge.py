"""Turns latents into rewards: decoding, placement of the model, micro-batches, checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.families.pictures import NonFinitePictures
from gdmd_lightning.latents import in_micro_batches, micro_batches
from gdmd_lightning.phases import phase
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.base import Reward, checked_score

Placement = Literal["accelerator", "offloaded", "cpu"]


class Judge:
    """Scores latents with a reward.

    Args:
        reward: The reward.
        family: Decodes latents.
        placement: Where the reward model stays: with the latents on the ``accelerator``, there only while it scores
            (``offloaded``), or on the ``cpu``.
        micro_batch_size: Maximum number of images decoded and scored at once without gradient; ``None`` for
            all.
    """

    def __init__(
        self,
        reward: Reward,
        family: ModelFamily,
        placement: Placement = "accelerator",
        micro_batch_size: int | None = None,
    ) -> None:
        self.reward, self.family = reward, family
        self.placement, self.micro_batch_size = placement, micro_batch_size
        self._scored: list[Tensor] = []
        self._gradient_checked = False

    def __call__(self, latents: Tensor, prompts: Sequence[Prompt], *, gradient: bool = False) -> Tensor:
        """Rewards ``[B]``, float32, of latents ``[B, C, H, W]``.

        Args:
            latents: Clean latents.
            prompts: One per latent.
            gradient: Keep the gradient through decoder and reward; then all images are in memory at once.

        Raises:
            NonFinitePictures: If generator or decoder give pictures that are not finite.
            UserError: If the reward raises, or returns the wrong shape or non-finite scores; or if the first pictures
                with gradient are black and white everywhere, so that none of it passes the decoder.
        """
        return self.combined(self._each(latents, prompts, gradient))

    def each(self, latents: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Rewards ``[B, R]`` of the ``R`` parts of a combined reward, unweighted and without gradient; see above."""
        return self._each(latents, prompts, gradient=False)

    @contextmanager
    def ahead(self, latents: Tensor, prompts: Sequence[Prompt]) -> Iterator[Callable[[], Tensor]]:
        """Start to score in a separate thread, so that the caller can do something else inside.

        Latents are decoded before that, and their images stay in memory until they are scored.

        Yields:
            A function to call once, which waits for what :meth:`each` would return and raises what it would.
        """
        rewards = tuple(reward for reward, _ in self.reward.parts)
        asked: list[Future[Tensor]] = []

        def answer() -> Tensor:
            with phase("reward"):
                return self._kept(torch.cat([each.result() for each in asked]))

        with ThreadPoolExecutor(1, thread_name_prefix="reward") as thread:
            try:
                with torch.no_grad():
                    for rows in micro_batches(len(latents), self.micro_batch_size):
                        images = self._decoded(latents[rows])
                        arguments = images, latents[rows], prompts[rows], rewards
                        asked.append(thread.submit(_as_here(images.device), self._ask, *arguments))
                        del images, arguments
                yield answer
            finally:
                thread.shutdown(cancel_futures=True)

    def combined(self, each: Tensor) -> Tensor:
        """Weighted sum ``[B, ...]`` over the parts of a combined reward, ``[B, R, ...]``."""
        # Numbers, not a tensor of weights: to copy one to a GPU would wait for it.
        return torch.stack([w * part for w, part in zip(self.weights, each.unbind(1), strict=True)]).sum(0)

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the parts of a combined reward, ``R`` of them."""
        return tuple(weight for _, weight in self.reward.parts)

    def logs(self) -> dict[str, Tensor]:
        """Of a combined reward: the mean unweighted score of each part since the last call; equal names get numbers."""
        names: list[str] = []
        for part, _ in self.reward.parts:
            names.append(f"reward/{part.name}" + (f"_{len(names) + 1}" if f"reward/{part.name}" in names else ""))
        if not self._scored:
            return {}
        means = torch.cat(self._scored).mean(0)
        self._scored.clear()
        return dict(zip(names, means.unbind(), strict=True))

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Fail early if these prompts lack what the reward needs.

        Raises:
            UserError: If a prompt lacks it; the message names the first one.
        """
        self.reward.check(prompts)

    def _each(self, latents: Tensor, prompts: Sequence[Prompt], gradient: bool) -> Tensor:
        rewards = tuple(reward for reward, _ in self.reward.parts)
        return self._kept((self._score if gradient else self._in_parts)(latents, prompts, rewards))

    def _kept(self, scores: Tensor) -> Tensor:
        """Scores ``[B, R]``, after they are noted for the logs if there are several rewards."""
        if scores.shape[1] > 1:
            self._scored.append(scores.detach())
        return scores

    @torch.no_grad()
    def _in_parts(self, latents: Tensor, prompts: Sequence[Prompt], rewards: Sequence[Reward]) -> Tensor:
        return in_micro_batches(
            lambda rows: self._score(latents[rows], prompts[rows], rewards), len(latents), self.micro_batch_size
        )

    def _score(self, latents: Tensor, prompts: Sequence[Prompt], rewards: Sequence[Reward]) -> Tensor:
        """Scores ``[B, len(rewards)]`` of one micro-batch, decoded once."""
        return self._ask(self._decoded(latents), latents, prompts, rewards)

    def _decoded(self, latents: Tensor) -> Tensor:
        with phase("decoding"):
            images = self.family.decode(latents)
        self._check_clipping(images)
        return images

    def _ask(self, images: Tensor, latents: Tensor, prompts: Sequence[Prompt], rewards: Sequence[Reward]) -> Tensor:
        """Scores ``[B, len(rewards)]`` of the images of these latents."""
        try:
            with phase("reward"), self._placed(images.device):
                # A copy for each, since a reward may change its input in place.
                own = (images.clone() for _ in rewards) if len(rewards) > 1 else iter([images])
                return torch.stack([checked_score(reward, next(own), prompts) for reward in rewards], dim=1)
        except NonFinitePictures as error:
            raise NonFinitePictures(error.rows, error.texts, latents) from error

    def _check_clipping(self, images: Tensor) -> None:
        """Fail if no pixel of the first pictures with gradient is inside (0, 1): where pixels are clipped, it is 0."""
        if not images.requires_grad or self._gradient_checked:
            return
        # Once, since it waits for the device.
        self._gradient_checked = True
        if bool(((images <= 0) | (images >= 1)).all()):
            raise UserError(
                "every pixel is 0 or 1, where the decoder clips, so the reward's gradient is 0",
                where=f"reward {self.reward.name!r}",
                remedy="start from a generator that makes pictures (model.start_from)",
            )

    @contextmanager
    def _placed(self, device: torch.device) -> Iterator[None]:
        if self.placement != "cpu":
            self.reward.to(device)
        yield
        if self.placement == "offloaded":
            self.reward.to(torch.device("cpu"))


def _as_here(device: torch.device) -> Callable[..., Tensor]:
    """``f(function, *arguments)``: a call in another thread as it would be here, without gradient.

    Precision, the current GPU and whether gradient is kept are a thread's own.
    """
    # There is no autocast on the meta device, where plans are made.
    mixed = device.type != "meta" and torch.is_autocast_enabled(device.type)
    precision = partial(torch.autocast, device.type, torch.get_autocast_dtype(device.type)) if mixed else nullcontext

    def call(function: Callable[..., Tensor], *arguments: object) -> Tensor:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with torch.no_grad(), precision():
            return function(*arguments)

    return call
