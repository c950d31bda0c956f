"""Settings of training the embedded Shapes pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gdmd_lightning.errors import UserError
from gdmd_lightning.ranges import Count, Decay, Fraction, Positive, Seed, Whole, ranged


@ranged
@dataclass(frozen=True)
class Stage:
    """Training of one part.

    Args:
        steps: Number of optimizer steps.
        batch_size: Pictures per step.
        learning_rate: Largest learning rate of the one-cycle schedule.
    """

    steps: Count
    batch_size: Count = 64
    learning_rate: Positive = 1e-3


@ranged
@dataclass(frozen=True)
class PretrainSettings:
    """Settings of ``pretrain``.

    Args:
        out: Directory of the finished pipeline; parts that already exist there are kept, and other
            settings than it was begun with are refused.
        autoencoder: Training of the autoencoder.
        scorer: Training of the text-image scorer.
        teacher: Training of the transformer and its text encoders.
        pictures: Number of training pictures.
        caption_noise: Share of captions with one wrong class, color, count or relation, in [0, 1].
        noise_from: Share of the teacher's training after which wrong captions occur, in [0, 1].
        num_layers: Number of transformer layers.
        num_heads: Number of attention heads; each is 32 wide.
        ema_decay: Decay of the teacher's averaged weights, which are the ones saved.
        threads: Number of CPU threads; 0 keeps torch's default.
        seed: Seed of pictures, weights and noise.
        start_from: Directory of an earlier pipeline whose transformer and text encoders get another cycle.

    Raises:
        UserError: If a batch needs more pictures than there are.
    """

    out: Path = Path("runs/shapes_teacher")
    autoencoder: Stage = Stage(steps=2000, batch_size=32, learning_rate=3e-3)
    scorer: Stage = Stage(steps=3000, batch_size=128)
    teacher: Stage = Stage(steps=8000, batch_size=64, learning_rate=1.5e-3)
    pictures: Count = 60_000
    caption_noise: Fraction = 0.3
    noise_from: Fraction = 0.8
    num_layers: Count = 6
    num_heads: Count = 4
    ema_decay: Decay = 0.999
    threads: Whole = 0
    seed: Seed = 0
    start_from: Path | None = None

    def __post_init__(self) -> None:
        for name, there in (("autoencoder", self.pictures // 3), ("scorer", self.pictures), ("teacher", self.pictures)):
            size = getattr(self, name).batch_size
            if size > there:
                raise UserError(
                    f"it is {size}", where=f"--{name}.batch_size", remedy=f"at most {there} of the pictures are used"
                )
