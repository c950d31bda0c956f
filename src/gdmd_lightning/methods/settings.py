"""Settings that several methods share."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.families.base import ModelFamily
from gdmd_lightning.ranges import Count, NonNegative, OpenLow, Positive, ranged
from gdmd_lightning.rewards.judge import Placement
from gdmd_lightning.schedules import RenoiseDistribution, Uniform
from gdmd_lightning.streams import BatchStream, draw_noise, draw_uniform

LOWEST_LEVEL = 1e-3
"""At which a network is asked: at 0 there is no noise to predict."""


def refuse_unused(settings: Any, key: str, because: str, *names: str) -> None:
    """Fail if a setting was changed that has no effect with the current value of another one.

    Args:
        settings: A dataclass with a default for each of ``names``.
        key: Of the settings, such as ``model.policy``.
        because: The other setting and its value, such as ``form weighted``.
        names: The settings without effect.

    Raises:
        UserError: If one of them has another value than its default.
    """
    for each in fields(settings):
        value = getattr(settings, each.name)
        if each.name in names and value != each.default:
            raise UserError(
                f"it is {value!r}, but has no effect with {because}",
                where=f"{key}.{each.name}",
                remedy=f"leave it at its default, {each.default!r}",
            )


@ranged
@dataclass(frozen=True)
class Matching:
    """Distribution matching: how teacher and fake score are evaluated, and how the fake score learns.

    Args:
        guidance_scale: Guidance scale of the teacher; fake score and generator use none.
        renoise_distribution: Levels at which both are evaluated.
        fake_score_renoise_distribution: Levels at which the fake score learns; null for
            ``renoise_distribution``.
        fake_score_updates: Fake-score updates per generator update.
        fake_score_samples: ``reused``: the fake score learns from the samples of the generator's step, at no
            extra evaluation of the generator; ``fresh``: new samples are generated for each of its updates,
            as in DMD2's code.
        interval: Levels at which a sample is matched and shown to the fake score: ``whole``: all; ``step``: only those
            above the level at which its step ends. Below it the next step takes over.
        guidance_levels: Levels at which the teacher's guidance is evaluated: ``shared``: those of the matching (DMD);
            ``above``: drawn for guidance alone, above the level at which the generator's step starts (Decoupled DMD);
            ``all``: drawn for guidance alone, from the whole distribution. Without guidance there is nothing to draw.
        floor: Lower limit of the normalizer ``n``.
    """

    guidance_scale: NonNegative = 3.0
    renoise_distribution: RenoiseDistribution = field(default_factory=Uniform)
    fake_score_renoise_distribution: RenoiseDistribution | None = None
    fake_score_updates: Count = 5
    fake_score_samples: Literal["reused", "fresh"] = "reused"
    interval: Literal["whole", "step"] = "whole"
    guidance_levels: Literal["shared", "above", "all"] = "shared"
    floor: Positive = 1e-3


@ranged
@dataclass(frozen=True)
class Consistency:
    """AC-DMD's consistency term: the fake score should predict the same clean latents before and after a step down.

    Args:
        weight: Weight of the term; 0 for none, which saves two evaluations of the fake score.
        reach: Longest step down; steps are uniform up to it and end above 0.

    Source: RTDMD (2605.26108): weight 0.01, 1 to 200 of 1000 timesteps.
    """

    weight: NonNegative = 0.01
    reach: OpenLow = 0.2

    def draw(self, t: Tensor, like: Tensor, rng: BatchStream) -> tuple[Tensor, list[Tensor]]:
        """Where steps down from levels ``t`` ``[B]`` end, and two independent noises of the shape of ``like``."""
        down = self.reach * (1 - draw_uniform((len(t),), rng)).to(t)
        noises = [draw_noise(tuple(like.shape), rng, like.device) for _ in range(2)]
        return (t - down).clamp(min=LOWEST_LEVEL), noises


@dataclass(frozen=True)
class Speed:
    """Options that are meant to make updates faster on a GPU; none changes what is learned, except for rounding.

    Args:
        compile: Compile the repeated blocks of networks with ``torch.compile``: of no network (``none``), of those
            that are not trained, such as the teacher (``frozen``), or of all (``blocks``).
        channels_last: Keep the weights of convolutions with their channels last in memory, in all networks and in the
            autoencoder. SDXL's network is mostly convolutions; those of SD3 and FLUX.2 have one or none.
        overlap_reward: Score in a separate thread while the fake score learns, before the generator's step (GDMD).
            It pays if the reward does not use the accelerator; samples are computed twice.
    """

    compile: Literal["none", "frozen", "blocks"] = "none"
    channels_last: bool = False
    overlap_reward: bool = False

    def check(self, family: ModelFamily, no_overlap: str | None, *, adapters: bool, sharded: bool) -> None:
        """Fail before anything is loaded if an option cannot work.

        Args:
            family: The teacher's family.
            no_overlap: Why the method cannot overlap its reward; ``None`` if it can.
            adapters: Whether roles are adapters.
            sharded: Whether the strategy splits or steps networks itself, as DeepSpeed and FSDP2 do.

        Raises:
            UserError: If one cannot.
        """
        if self.channels_last and sharded:
            raise UserError(
                "DeepSpeed and FSDP2 lay weights out themselves",
                where="model.speed.channels_last",
                remedy="use one GPU or ddp, or false",
            )
        if self.overlap_reward and no_overlap is not None:
            raise UserError(no_overlap, where="model.speed.overlap_reward", remedy="use false")
        if self.compile != "none":
            self._check_compile(family, adapters=adapters, sharded=sharded)

    def _check_compile(self, family: ModelFamily, *, adapters: bool, sharded: bool) -> None:
        where = "model.speed.compile"
        if sharded:
            raise UserError(
                "blocks are not compiled under DeepSpeed and FSDP2, which gather their weights in hooks",
                where=where,
                remedy="use one GPU or ddp, or none",
            )
        if adapters and self.compile == "frozen":
            raise UserError(
                "with model.lora the teacher is the network that is trained, so none is frozen",
                where=where,
                remedy="use blocks, or none",
            )
        if not family.repeated_blocks:
            raise UserError(
                f"{type(family).__name__} does not name its repeated blocks",
                where=where,
                remedy="use none, or set repeated_blocks in the family",
            )


@dataclass(frozen=True)
class Memory:
    """Memory-saving options; none changes what is learned, except for rounding.

    Args:
        gradient_checkpointing: Recompute activations in the backward pass; takes about a third more time.
        vae_slicing: Decode one image at a time.
        vae_tiling: Decode an image in overlapping tiles, which changes their seams slightly.
        reward: Where the reward model stays: on the ``accelerator``, ``offloaded`` to the CPU between uses, or on the
            ``cpu``. Methods that backpropagate through it refuse ``offloaded``.
    """

    gradient_checkpointing: bool = False
    vae_slicing: bool = False
    vae_tiling: bool = False
    reward: Placement = "accelerator"
