"""The record of gradient rewards: a row for every judged target, in parquet, and some of the pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from gdmd_lightning.errors import UserError
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.verdicts import Judged

COLUMNS = {
    "step": "int64", "rank": "int32", "state": "int32", "target": "int32", "prompt": "string", "sigma": "float32",
    "t": "float32", "snapshot": "int32", "reward_sample": "float32", "reward_target": "float32",
    "advantage": "float32", "weight": "float32", "gradient": "float32",
}  # fmt: skip


class GradientRewardRecord(pl.Callback):
    """Writes what a method leaves in ``judged`` after each update.

    Parts lie in ``gradient_rewards/`` of the log directory as ``part-<first step>-<rank>.parquet`` (one dataset to
    pyarrow, pandas and polars), each moved into place only when whole. A resumed run drops what was recorded after
    its checkpoint. Columns: ``step``, ``rank``, ``state`` and ``target`` (indices in the batch and the group),
    ``prompt``, ``sigma`` (of the student's state), ``t`` (renoise level), ``snapshot`` (0 is the present fake score),
    ``reward_sample`` (null unless ``verdict.score_samples``), ``reward_target``, ``advantage``, ``weight`` (signed,
    first order) and ``gradient`` (mean ``|g|``).

    Args:
        flush_every: Updates a part holds.
        pictures_every: Updates between two files of pictures, ``pictures-<step>.safetensors`` with ``samples``
            ``[N, 3, H, W]`` and ``targets`` ``[N, M, 3, H, W]`` of the first ``pictures`` states; 0 for none.
        pictures: ``N``.
    """

    def __init__(self, flush_every: int = 50, pictures_every: int = 0, pictures: int = 6) -> None:
        if flush_every < 1:
            raise UserError(f"flush_every is {flush_every}", where="GradientRewardRecord", remedy="use at least 1")
        self.flush_every, self.pictures_every, self.pictures = flush_every, pictures_every, pictures
        self._waiting: list[tuple[int, Judged]] = []
        self._place = Path()

    @staticmethod
    def directory(trainer: pl.Trainer) -> Path:
        """Where the record of this run lies; Lightning's ``log_dir`` is a broadcast, so all ranks must ask together."""
        return Path(trainer.log_dir or trainer.default_root_dir) / "gradient_rewards"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a method that judges nothing, before anything is loaded."""
        if not hasattr(pl_module, "judged"):
            raise UserError(
                f"{type(pl_module).__name__} judges no targets",
                where="GradientRewardRecord",
                remedy="remove this callback or use GDMD",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop what a resumed run will write again; earlier hooks do not yet know where it resumes."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        self._waiting.clear()
        self._place = self.directory(trainer)
        for part in sorted(self._place.glob(f"part-*-{trainer.global_rank}.parquet")):
            table = pq.read_table(part)
            kept = table.filter(pc.field("step") < trainer.global_step)
            if len(kept) == 0:
                part.unlink()
            elif len(kept) < len(table):
                _write(kept, part)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep this update's verdicts, on the device until they are written."""
        assert isinstance(pl_module, DistillationModule)
        judged: Any = pl_module.judged
        step = trainer.global_step - 1  # the update that has just been counted
        self._waiting.append((step, judged.without_pictures()))
        if self.pictures_every and step % self.pictures_every == 0 and trainer.is_global_zero:
            self._save_pictures(pl_module, judged, step)
        if len(self._waiting) >= self.flush_every:
            self._flush(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """A checkpoint's run goes on after it, so everything up to it must be on disk."""
        self._flush(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the rest."""
        self._flush(trainer)

    def _flush(self, trainer: pl.Trainer) -> None:
        if not self._waiting:
            return
        import pyarrow as pa

        columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for step, judged in self._waiting:
            batch, size = judged.rewards.shape
            for name, values in _rows(judged).items():
                columns[name] += values
            columns["step"] += [step] * (batch * size)
            columns["rank"] += [trainer.global_rank] * (batch * size)
        schema = pa.schema([(name, getattr(pa, kind)()) for name, kind in COLUMNS.items()])
        first = self._waiting[0][0]
        self._place.mkdir(parents=True, exist_ok=True)
        _write(pa.table(columns, schema), self._place / f"part-{first:08d}-{trainer.global_rank}.parquet")
        self._waiting.clear()

    @torch.no_grad()
    def _save_pictures(self, module: DistillationModule, judged: Judged, step: int) -> None:
        from safetensors.torch import save_file

        samples = module.family.decode(judged.x[: self.pictures])
        targets = module.family.decode(judged.targets.y[: self.pictures].flatten(0, 1))
        self._place.mkdir(parents=True, exist_ok=True)
        tensors = {"samples": samples, "targets": targets.unflatten(0, judged.targets.level[: self.pictures].shape)}
        target = self._place / f"pictures-{step:08d}.safetensors"
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, target.with_suffix(".tmp"))
        os.replace(target.with_suffix(".tmp"), target)


def _rows(judged: Judged) -> dict[str, list[Any]]:
    batch, size = judged.rewards.shape

    def flat(values: Tensor) -> list[Any]:
        return values.expand(batch, size).flatten().float().cpu().tolist()

    own = [None] * (batch * size) if judged.own is None else flat(judged.own[:, None])
    return {
        "state": torch.arange(batch).repeat_interleave(size).tolist(),
        "target": list(range(size)) * batch,
        "prompt": [prompt.text for prompt in judged.prompts for _ in range(size)],
        "sigma": flat(judged.state.sigma[:, None]),
        "t": flat(judged.targets.level),
        "snapshot": judged.targets.snapshot.tolist() * batch,
        "reward_sample": own,
        "reward_target": flat(judged.rewards),
        "advantage": flat(judged.advantage),
        "weight": flat(judged.weight()),
        "gradient": flat(judged.gradient),
    }


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    fresh = path.with_suffix(".tmp")
    pq.write_table(table, fresh)
    os.replace(fresh, path)
