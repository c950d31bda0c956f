"""The record of gradient rewards: one row per judged target, in parquet, and some of the images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from gdmd_lightning.callbacks.run_directory import run_directory, starts_over
from gdmd_lightning.callbacks.write_warnings import warn_if_not_written
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import atomic_file
from gdmd_lightning.methods.base import DistillationModule
from gdmd_lightning.methods.record import JudgedTargets
from gdmd_lightning.ranges import Count, Whole, ranged

if TYPE_CHECKING:
    import pyarrow as pa

COLUMNS = {
    "step": "int64", "rank": "int32", "state": "int32", "target": "int32", "prompt": "string", "sigma": "float32",
    "t": "float32", "snapshot": "int32", "reward_sample": "float32", "reward_target": "float32",
    "advantage": "float32", "weight": "float32", "gradient": "float32",
}  # fmt: skip


@ranged
class GradientRewardRecord(pl.Callback):
    """Writes the judged targets that each update reports.

    Parts are written to ``gradient_rewards/`` in the run's directory as ``part-<first step>-<rank>.parquet``,
    each one complete or absent; pyarrow, pandas and polars read them as one dataset. A resumed run drops rows
    recorded after its checkpoint, and renames a part that a failing disk has damaged to ``.damaged``. A
    ``fast_dev_run`` writes and drops nothing.

    Columns: ``step``, ``rank``, ``state`` and ``target`` (indices in the batch and the group), ``prompt``,
    ``sigma`` (of the student's state), ``t`` (renoise level), ``snapshot`` (0 is the current fake score),
    ``reward_sample`` (null unless ``advantages.score_samples``), ``reward_target``, ``advantage``, ``weight``
    (signed, first order) and ``gradient`` (mean ``|g|``).

    Args:
        flush_every: Updates per part.
        pictures_every: Updates between two files of images, ``pictures-<step>.safetensors`` with ``samples``
            ``[N, 3, H, W]`` and ``targets`` ``[N, M, 3, H, W]`` of the first ``pictures`` states; 0 for none.
        pictures: Number of states per file, ``N``.
    """

    def __init__(self, flush_every: Count = 50, pictures_every: Whole = 0, pictures: Count = 6) -> None:
        self.flush_every, self.pictures_every, self.pictures = flush_every, pictures_every, pictures
        self._waiting: list[tuple[int, JudgedTargets]] = []
        self._place = Path()

    @staticmethod
    def directory(trainer: pl.Trainer) -> Path:
        """Directory of this run's record."""
        return run_directory(trainer) / "gradient_rewards"

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fail before loading anything if the method judges no targets."""
        if not getattr(pl_module, "keeps_record", False):
            raise UserError(
                f"{type(pl_module).__name__} judges no targets",
                where="GradientRewardRecord",
                remedy="remove this callback or use GDMD",
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Drop rows that a resumed or restarted run will write again; earlier hooks do not know the update yet."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        assert isinstance(pl_module, DistillationModule)
        self._waiting.clear()
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._place = self.directory(trainer)
        earlier = sorted(self._place.glob("part-*-*.parquet"))
        if earlier and trainer.ckpt_path is None and not starts_over(trainer):
            remedy = "continue that run with ckpt_path, or give this one a directory of its own"
            raise UserError("it has the record of another run", where=str(self._place), remedy=remedy)
        for part in earlier:
            # The resumed run may have fewer ranks than the one that wrote the parts.
            if int(part.stem.rsplit("-", 1)[1]) % trainer.world_size != trainer.global_rank:
                continue
            try:
                table = pq.read_table(part)
            except (pa.ArrowException, OSError) as error:
                rank_zero_info(f"warning: {part} is damaged and dropped; its rows are lost: {error}")
                part.rename(part.with_suffix(".damaged"))
                continue
            kept = table.filter(pc.field("step") < pl_module.updates)
            if len(kept) == 0:
                part.unlink()
            elif len(kept) < len(table):
                _write(kept, part)
        if trainer.is_global_zero:
            for pictures in self._place.glob("pictures-*.safetensors"):
                if int(pictures.stem.removeprefix("pictures-")) >= pl_module.updates:
                    pictures.unlink()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keep this update's record, on the device until it is written."""
        assert isinstance(pl_module, DistillationModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        judged: JudgedTargets = outputs["record"]
        step = pl_module.updates - 1
        self._waiting.append((step, judged.without_latents()))
        if self.pictures_every and step % self.pictures_every == 0 and trainer.is_global_zero:
            with warn_if_not_written():
                self._save_images(pl_module, judged, step)
        if len(self._waiting) >= self.flush_every:
            self._flush(trainer)

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: Any) -> None:
        """Write the pending rows: a run resumed from this checkpoint continues after it."""
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
        with warn_if_not_written():
            _write(pa.table(columns, schema), self._place / f"part-{first:08d}-{trainer.global_rank}.parquet")
        self._waiting.clear()

    @torch.no_grad()
    def _save_images(self, module: DistillationModule, judged: JudgedTargets, step: int) -> None:
        from safetensors.torch import save_file

        targets = judged.targets[: self.pictures]
        decoded = module.family.decode(targets.flatten(0, 1))
        tensors = {
            "samples": module.family.decode(judged.x[: self.pictures]),
            "targets": decoded.unflatten(0, targets.shape[:2]),
        }
        with atomic_file(self._place / f"pictures-{step:08d}.safetensors") as part:
            save_file({name: images.cpu().contiguous() for name, images in tensors.items()}, part)


def read_record(run: Path) -> pa.Table:
    """Read a run's record, sorted by update, state and target.

    Args:
        run: The run's directory.

    Raises:
        UserError: If it has no record.
    """
    import pyarrow.dataset as ds

    parts = sorted(map(str, (Path(run) / "gradient_rewards").glob("part-*.parquet")))
    if not parts:
        remedy = "give the directory of a GDMD run that was trained with GradientRewardRecord"
        raise UserError("it has no record of gradient rewards", where=str(run), remedy=remedy)
    table: pa.Table = ds.dataset(parts).to_table()
    return table.sort_by([(name, "ascending") for name in ("step", "rank", "state", "target")])


def _rows(judged: JudgedTargets) -> dict[str, list[Any]]:
    batch, size = judged.rewards.shape

    def flat(values: Tensor) -> list[Any]:
        return values.expand(batch, size).flatten().float().cpu().tolist()

    scored = None if judged.sample_reward is None else flat(judged.sample_reward[:, None])
    return {
        "state": torch.arange(batch).repeat_interleave(size).tolist(),
        "target": list(range(size)) * batch,
        "prompt": [prompt.text for prompt in judged.prompts for _ in range(size)],
        "sigma": flat(judged.sigma[:, None]),
        "t": flat(judged.renoise_sigma),
        "snapshot": judged.snapshot.tolist() * batch,
        "reward_sample": scored or [None] * (batch * size),
        "reward_target": flat(judged.rewards),
        "advantage": flat(judged.advantages),
        "weight": flat(judged.weight()),
        "gradient": flat(judged.gradient),
    }


def _write(table: Any, path: Path) -> None:
    import pyarrow.parquet as pq

    with atomic_file(path) as part:
        pq.write_table(table, part)
