"""Rules that say when a logged figure has moved too far, and the memory that they need."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from gdmd_lightning.ranges import Count, OpenFraction, Range, ranged


@ranged
@dataclass(frozen=True)
class Fall:
    """A figure that must not fall far, such as a held-out reward or diversity.

    Args:
        figure: Its name in the log, such as ``eval/hps_like/overall``.
        by: Relative fall that is too much, in (0, 1).
        against: What the fall is relative to: the ``best`` value so far, or that at the ``start``.
        patience: Observations in a row for which it must last.
    """

    figure: str
    by: OpenFraction
    against: Literal["best", "start"] = "best"
    patience: Count = 2

    def reference(self, healthy: list[float]) -> float | None:
        """What to compare with; None if there is nothing yet."""
        return healthy[0] if healthy else None

    def breached(self, value: float, reference: float) -> bool:
        """Whether a value has moved too far; NaN has."""
        return not value >= reference - self.by * abs(reference)

    def remember(self, healthy: list[float], value: float) -> list[float]:
        """The healthy values to keep, given one more."""
        if not healthy:
            return [value]
        return [max(healthy[0], value)] if self.against == "best" else healthy


@ranged
@dataclass(frozen=True)
class Rise:
    """A figure that must not rise far, such as a gradient norm, the fake score's loss or the latents' spread.

    Args:
        figure: Its name in the log, such as ``train/grad_norm/generator``.
        factor: Multiple of the running median that is too much, above 1.
        window: Observations of the running median; the rule waits for as many. Those that are too high do not count.
        patience: Observations in a row for which it must last.
    """

    figure: str
    factor: Annotated[float, Range(1, above=True)]
    window: Count = 10
    patience: Count = 2

    def reference(self, healthy: list[float]) -> float | None:
        """What to compare with; None if there are too few observations yet."""
        return statistics.median(healthy) if len(healthy) == self.window else None

    def breached(self, value: float, reference: float) -> bool:
        """Whether a value has moved too far; NaN has."""
        return not value <= reference + (self.factor - 1) * abs(reference)

    def remember(self, healthy: list[float], value: float) -> list[float]:
        """The healthy values to keep, given one more."""
        return [*healthy, value][-self.window :]


Rule = Fall | Rise


@dataclass(frozen=True)
class Move:
    """The first of the observations in a row in which a figure was out of bounds.

    Args:
        figure: Its name.
        update: The update of the observation.
        reference: What it was compared with.
        value: What was observed.
    """

    figure: str
    update: int
    reference: float
    value: float

    def __str__(self) -> str:
        return f"{self.figure} at update {self.update}, from {self.reference:.4g} to {self.value:.4g}"


@dataclass
class Track:
    """What a rule has seen.

    Args:
        rule: The rule.
        healthy: The observations within bounds that it needs.
        streak: Observations in a row that were out of bounds, up to the last one.
        move: The first of them.
    """

    rule: Rule
    healthy: list[float] = field(default_factory=list)
    streak: int = 0
    move: Move | None = None

    def observe(self, update: int, value: float) -> None:
        """Take one observation into account."""
        reference = self.rule.reference(self.healthy)
        if reference is not None and self.rule.breached(value, reference):
            self.streak += 1
            self.move = self.move or Move(self.rule.figure, update, reference, value)
            return
        self.calm()
        if math.isfinite(value):
            self.healthy = self.rule.remember(self.healthy, value)

    def calm(self) -> None:
        """Forget the observations that were out of bounds."""
        self.streak, self.move = 0, None

    @property
    def alarmed(self) -> bool:
        """Whether it has been out of bounds for long enough."""
        return self.streak >= self.rule.patience

    def state_dict(self) -> dict[str, Any]:
        """What it has seen, as plain values."""
        move = None if self.move is None else asdict(self.move)
        return {"healthy": list(self.healthy), "streak": self.streak, "move": move}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.healthy, self.streak = list(state["healthy"]), state["streak"]
        self.move = None if state["move"] is None else Move(**state["move"])


def first_move(tracks: list[Track]) -> Move | None:
    """The earliest move that still lasts; of several in one update, that of the rule that comes first."""
    return min((track.move for track in tracks if track.move is not None), key=lambda move: move.update, default=None)
