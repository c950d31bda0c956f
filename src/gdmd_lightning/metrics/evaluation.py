"""Score a generator on fixed prompts with fixed noise."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.metrics.intervals import Value
from gdmd_lightning.metrics.scores import TaskScore
from gdmd_lightning.prompts import Prompt

Generate = Callable[[Tensor, list[str]], Tensor]
"""``generate(noise [B, C, H, W], texts) -> pictures [B, 3, H, W] in [0, 1]``."""

Keep = Callable[[Sequence[int], Tensor, Sequence[Prompt], Mapping[str, Sequence[Value]]], None]
"""Gets pictures with their indices in the test set, their prompts, and their values by score."""


class Pace:
    """How the ranks of an evaluation go through their batches: here each by itself."""

    def rounds(self, batches: int) -> int:
        """Number of rounds on all ranks, if this one has this number of batches."""
        return batches

    def round(self) -> AbstractContextManager[None]:
        """Context of the generation in a round; all ranks enter it in every round."""
        return nullcontext()

    def after(self) -> None:
        """Called by all ranks after every round."""


def fixed_noise(index: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Noise of prompt number ``index``; it does not depend on batch, rank or method."""
    # Not a named stream: the published tables use these seeds, which `streams.stream` cannot produce.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1_000_003 + index))


def shown(prompts: Sequence[Prompt], columns: int, shape: tuple[int, ...], seed: int) -> tuple[list[str], Tensor]:
    """Texts and noise ``[N, C, H, W]`` of pictures to show, spread over the test set and thus its tasks."""
    columns = min(columns, len(prompts))
    rows = [i * len(prompts) // columns + i * len(prompts) // (columns * columns) for i in range(columns)]
    return [prompts[i].text for i in rows], torch.stack([fixed_noise(i, shape, seed) for i in rows])


def check_names(scores: Iterable[TaskScore], where: str) -> None:
    """Fail if two scores that are reported together have the same name: one would hide the other.

    Raises:
        UserError: If two have.
    """
    counts = Counter(score.name for score in scores)
    if same := [name for name, count in counts.items() if count > 1]:
        raise UserError(
            f"two scores are named {same[0]!r}",
            where=where,
            remedy="give one of them another name; a RewardScore has that of its reward",
        )


@torch.no_grad()
def evaluate(
    generate: Generate,
    prompts: Sequence[Prompt],
    scores: Sequence[TaskScore],
    latent_shape: tuple[int, ...],
    *,
    seed: int = 0,
    batch_size: int = 100,
    device: torch.device = torch.device("cpu"),
    rank: int = 0,
    world_size: int = 1,
    known: Mapping[int, Mapping[str, Value]] | None = None,
    keep: Keep | None = None,
    pace: Pace | None = None,
) -> float:
    """Generate a picture for each prompt and add all of them to the scores.

    Args:
        generate: The generator.
        prompts: The whole test set; each rank takes every ``world_size``-th prompt.
        scores: Metrics to fill; call ``compute`` or ``intervals`` afterwards.
        latent_shape: Shape of one latent, ``(C, H, W)``.
        seed: Seed of the noise.
        batch_size: Pictures per call of ``generate``.
        device: Device of the noise and the scores.
        rank: Rank of this process.
        world_size: Number of processes.
        known: Values by score of pictures that were judged before, by their index: they are neither made nor judged.
        keep: Gets what is made.
        pace: How the ranks go on together; by default each by itself.

    Returns:
        Seconds of generation per picture; NaN if none was made.
    """
    known, pace = known or {}, pace or Pace()
    mine = range(rank, len(prompts), world_size)
    before, missing = [i for i in mine if i in known], [i for i in mine if i not in known]
    for score in scores:
        _begin(score, prompts, {i: known[i][score.name] for i in before}, device)
    seconds = 0.0
    for turn in range(pace.rounds(math.ceil(len(missing) / batch_size))):
        rows = missing[turn * batch_size : (turn + 1) * batch_size]
        asked = [prompts[i] for i in rows]
        with pace.round():
            if rows:
                noise = torch.stack([fixed_noise(i, latent_shape, seed) for i in rows]).to(device)
                images, taken = _timed(generate, noise, [prompt.text for prompt in asked])
                seconds += taken
        if rows:
            values = {score.name: score.values_of(images, asked) for score in scores}
            for score in scores:
                score.update(values[score.name], asked)
            if keep is not None:
                keep(rows, images, asked, values)
        pace.after()
    for score in scores:
        # Between evaluations their networks would only take memory from the training.
        score.place(torch.device("cpu"))
    return seconds / len(missing) if missing else math.nan


def _begin(score: TaskScore, prompts: Sequence[Prompt], known: Mapping[int, Value], device: torch.device) -> None:
    """Start a score over, on the device, with the values that are known."""
    score.begin(prompts)
    score.to(device)
    if known:
        score.update(list(known.values()), [prompts[i] for i in known])
    score.place(device)


def _timed(generate: Generate, noise: Tensor, texts: list[str]) -> tuple[Tensor, float]:
    """The pictures of this noise, and the seconds that they took."""
    began = time.perf_counter()
    images = generate(noise, texts)
    images[0, 0, 0, 0].item()  # wait for the device
    return images, time.perf_counter() - began
