"""Notices reward hacking and collapse in what is logged, and warns, stops the run, or goes back to its best state."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from gdmd_lightning.callbacks.collapse_rules import Fall, Rise, Rule, Track, first_move
from gdmd_lightning.callbacks.known_figures import no_figure, source_of
from gdmd_lightning.callbacks.roll_back import best_checkpoint, change_course, restore_in_place
from gdmd_lightning.callbacks.run_directory import CHECKPOINTS, run_directory
from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.checkpointing import read_checkpoint
from gdmd_lightning.methods.lightning import RoleModule
from gdmd_lightning.methods.provenance import read_provenance
from gdmd_lightning.ranges import Count, OpenLow, ranged
from gdmd_lightning.strategies import MultiEngineDeepSpeedStrategy


@ranged
@dataclass(frozen=True)
class RollBack:
    """How a run goes on from its best checkpoint.

    Args:
        limit: Roll-backs of a run; one more alarm stops it.
        learning_rate_factor: Factor on all learning rates, applied once more at each roll-back.
    """

    limit: Count = 2
    learning_rate_factor: OpenLow = 0.5


@ranged
class CollapseWatch(pl.Callback):
    """Compares logged figures with what they were, and says which one moved first.

    It reads the latest logged values every ``every_n_updates`` updates, after the evaluations of that update, so list
    it after their callbacks. Rank 0's values count for all ranks.

    Args:
        falls: Figures that must not fall.
        rises: Figures that must not rise.
        every_n_updates: Updates between two observations; a multiple of the interval at which the figures are logged.
        policy: ``warn``: once per alarm. ``stop``: save ``collapsed.ckpt``, end the run, and fail. ``roll_back``: go on
            from the best checkpoint of a ``ModelCheckpoint`` with ``monitor``, with new random numbers, the prompts
            that come next, and smaller learning rates; stop if there is none from before the first move.
        roll_back: Limits of that policy.

    Attributes:
        rolled_back: Roll-backs so far; part of the checkpoint.
    """

    def __init__(
        self,
        falls: tuple[Fall, ...] = (),
        rises: tuple[Rise, ...] = (),
        every_n_updates: Count = 100,
        policy: Literal["warn", "stop", "roll_back"] = "warn",
        roll_back: RollBack = RollBack(),
    ) -> None:
        rules: list[Rule] = [*falls, *rises]
        if not rules:
            raise UserError("no figure is watched", where="CollapseWatch", remedy="give it falls or rises")
        if len(set(rules)) < len(rules):
            raise UserError("a rule is given twice", where="CollapseWatch", remedy="give each rule once")
        self.every_n_updates, self.policy, self.roll_back = every_n_updates, policy, roll_back
        self.tracks = [Track(rule) for rule in rules]
        self.rolled_back = 0
        self._seed: int | None = None
        self._failure: UserError | None = None

    @property
    def state_key(self) -> str:
        """Watches of different intervals, policies or rules keep their states apart."""
        rules = [track.rule for track in self.tracks]
        return self._generate_state_key(every_n_updates=self.every_n_updates, policy=self.policy, rules=rules)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fail early if a figure cannot be there when it is observed, or if nothing could be rolled back to."""
        assert isinstance(pl_module, RoleModule)
        if self._seed is None:
            self._seed = pl_module.seed
        for track in self.tracks:
            self._check_source(trainer, track.rule.figure)
        if self.policy == "roll_back":
            _check_roll_back(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let a resumed run keep the course of its roll-backs."""
        assert isinstance(pl_module, RoleModule)
        if self.rolled_back:
            self._change_course(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Observe when due, and act on an alarm."""
        assert isinstance(pl_module, RoleModule)
        if pl_module.updates % self.every_n_updates:
            return
        before = [track for track in self.tracks if track.alarmed]
        values = self._observed(trainer, pl_module.updates)
        for track in self.tracks:
            track.observe(pl_module.updates, values[track.rule.figure])
        alarms = [track for track in self.tracks if track.alarmed]
        if self.policy == "warn":  # once per alarm; a resumed run that was stopped in this state stops again
            alarms = [track for track in alarms if track not in before]
        if alarms:
            self._act(trainer, pl_module, alarms[0], values[alarms[0].rule.figure])

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Fail if the run was stopped; everything is saved by now."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def state_dict(self) -> dict[str, Any]:
        """What each rule has seen, and the number of roll-backs."""
        return {"rolled_back": self.rolled_back, "rules": {repr(t.rule): t.state_dict() for t in self.tracks}}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the state of a watch with the same interval and another policy or other rules, if it is meant."""
        states = checkpoint.get("callbacks", {})
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        same = [c for c in callbacks if isinstance(c, CollapseWatch) and c.every_n_updates == self.every_n_updates]
        changed = [each for each in same if each.state_key not in states]
        if self not in changed:
            return
        # Of a checkpoint of an earlier version, the key is the interval alone.
        interval = self._generate_state_key(every_n_updates=self.every_n_updates)
        keys = {key for key in states if key.startswith((interval, f"{interval.removesuffix('}')},"))}
        mine = {repr(track.rule) for track in self.tracks}
        for key in sorted(keys - {each.state_key for each in same}):
            if changed == [self] or not mine.isdisjoint(states[key]["rules"]):
                return self.load_state_dict(deepcopy(states[key]))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue; a rule that is new or has changed starts over."""
        self.rolled_back = state_dict["rolled_back"]
        for track in self.tracks:
            if (known := state_dict["rules"].get(repr(track.rule))) is not None:
                track.load_state_dict(known)

    def _check_source(self, trainer: pl.Trainer, figure: str) -> None:
        """Fail if the callback that logs a figure is absent, comes later, or logs at other updates."""
        kind = source_of(figure)
        if kind is None:
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        found = [c for c in callbacks[: callbacks.index(self)] if isinstance(c, kind)]
        where, name = f"CollapseWatch: {figure}", kind.__name__
        if not found:
            raise UserError(f"no {name} before CollapseWatch logs it", where=where, remedy=f"list a {name} before it")
        intervals = [c.every_n_updates for c in found]
        if all(self.every_n_updates % interval for interval in intervals):
            raise UserError(
                f"it is logged every {intervals[0]} updates and observed every {self.every_n_updates}",
                where=where,
                remedy=f"let CollapseWatch.every_n_updates be a multiple of {intervals[0]}",
            )

    def _observed(self, trainer: pl.Trainer, update: int) -> dict[str, float]:
        """The latest value of every watched figure, as rank 0 has it."""
        logged = trainer.callback_metrics
        values = {t.rule.figure: float(logged[t.rule.figure]) for t in self.tracks if t.rule.figure in logged}
        values = trainer.strategy.broadcast(values)
        for track in self.tracks:
            if track.rule.figure not in values:
                raise no_figure(track.rule.figure, "CollapseWatch", update, logged)
        return values

    def _act(self, trainer: pl.Trainer, module: RoleModule, alarm: Track, value: float) -> None:
        first = first_move(self.tracks)
        assert first is not None
        story = f"first moved {first}"
        if alarm.rule.figure != first.figure:
            story += f"; then {alarm.move}, now {value:.4g}"
        if self.policy == "warn":
            rank_zero_warn(f"The run may be collapsing: {story}.")
        elif self.policy == "stop":
            self._stop(trainer, module, story)
        else:
            self._go_back(trainer, module, story, first.update)

    def _stop(self, trainer: pl.Trainer, module: RoleModule, story: str) -> None:
        path = run_directory(trainer) / CHECKPOINTS / "collapsed.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        trainer.should_stop = True
        self._failure = UserError(
            f"stopped after {module.updates} updates: {story}",
            where="CollapseWatch",
            remedy=f"resume from an earlier checkpoint with other settings; the last state is in {path}",
        )

    def _go_back(self, trainer: pl.Trainer, module: RoleModule, story: str, moved: int) -> None:
        path = best_checkpoint(trainer)
        if self.rolled_back >= self.roll_back.limit:
            return self._stop(trainer, module, f"{story}; it was rolled back {self.rolled_back} times before")
        if path is None:
            return self._stop(trainer, module, f"{story}; there is no best checkpoint yet")
        try:
            there = _updates_of(path)
        except UserError as error:
            return self._stop(trainer, module, f"{story}; the best checkpoint cannot be read: {error}")
        if there >= moved:
            return self._stop(trainer, module, f"{story}; the best checkpoint is of update {there}, not before that")
        collapsed = module.updates
        restore_in_place(trainer, module, path)
        self.rolled_back += 1
        for track in self.tracks:
            track.calm()
        self._change_course(trainer, module)
        rank_zero_warn(
            f"The run was collapsing: {story}. It goes on from update {module.updates} instead of {collapsed}, with "
            f"learning rates times {self.roll_back.learning_rate_factor**self.rolled_back:g} (roll-back "
            f"{self.rolled_back} of {self.roll_back.limit})."
        )

    def _change_course(self, trainer: pl.Trainer, module: RoleModule) -> None:
        assert self._seed is not None
        factor = self.roll_back.learning_rate_factor**self.rolled_back
        change_course(trainer, module, self._seed, self.rolled_back, factor)


def _check_roll_back(trainer: pl.Trainer) -> None:
    """Fail if there will be no best checkpoint, or if the strategy cannot load one while it trains."""
    keepers = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    if not any(each.monitor is not None and each.save_top_k and not each.save_weights_only for each in keepers):
        raise UserError(
            "no ModelCheckpoint keeps the best whole checkpoint by a figure",
            where="CollapseWatch.policy roll_back",
            remedy="add one with monitor, such as a held-out reward, without save_top_k 0 and save_weights_only",
        )
    can = isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy)
    if not can or isinstance(trainer.strategy, MultiEngineDeepSpeedStrategy):
        raise UserError(
            f"{type(trainer.strategy).__name__} cannot load a checkpoint while it trains",
            where="CollapseWatch.policy roll_back",
            remedy="use policy stop, or one device or ddp",
        )


def _updates_of(path: Path) -> int:
    return read_provenance(read_checkpoint(str(path), in_memory=False)).updates
