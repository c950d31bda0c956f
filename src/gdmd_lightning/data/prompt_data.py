"""Training prompts as a Lightning data module whose exact position is part of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from gdmd_lightning.data.identity import content_of
from gdmd_lightning.data.readers import GenEvalPrompts, ShapesPrompts, open_source
from gdmd_lightning.data.stream import PromptStream
from gdmd_lightning.data.workers import outlive_signals
from gdmd_lightning.errors import UserError
from gdmd_lightning.geneval.training_prompts import all_training_prompts
from gdmd_lightning.prompts import Prompt, PromptBatch
from gdmd_lightning.ranges import Count, Seed, Whole, ranged
from gdmd_lightning.shapes.captions import TASK_WEIGHTS, prompts


class PromptLoader:
    """Yields the batches of a stream; each new iterator starts at training's current position.

    Lightning creates an iterator for every epoch. Its epochs are unrelated to passes over the prompts.

    Args:
        stream: Creates the stream at the current position.
        num_workers: Number of reading processes; with 0 the training process reads.
    """

    def __init__(self, stream: Callable[[], PromptStream], num_workers: int) -> None:
        self.stream, self.num_workers = stream, num_workers

    def __iter__(self) -> Iterator[PromptBatch]:
        loader = DataLoader(
            self.stream(),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            # By default every new iterator would draw from torch's global random stream.
            generator=torch.Generator(),
            worker_init_fn=outlive_signals,
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def samples_of_rank(
    batch_size: int, group_size: int, global_batch_size: int | None, ranks: int, accumulate: int = 1
) -> int:
    """Samples of an update on one rank; arguments as of :class:`PromptDataModule` and :meth:`PromptDataModule.divide`.

    Raises:
        UserError: If ``global_batch_size`` cannot be divided into whole groups, or ``accumulate`` is not 1 with it.
    """
    if global_batch_size is None:
        return batch_size * accumulate
    if accumulate != 1:
        raise UserError(
            f"it is {accumulate}, but data.global_batch_size says how many samples an update has",
            where="model.accumulate",
            remedy="set it to 1: each rank has at most data.batch_size samples in memory anyway",
        )
    samples, rest = divmod(global_batch_size, ranks)
    if rest or samples % group_size:
        unit = ranks * group_size
        raise UserError(
            f"{global_batch_size} samples cannot be divided over {ranks} ranks in groups of {group_size}",
            where="data.global_batch_size",
            remedy=f"use a multiple of {unit}, such as {-(-global_batch_size // unit) * unit}",
        )
    return samples


@ranged
class PromptDataModule(LightningDataModule):
    """Training prompts from a file, a data set or the Shapes world, repeated endlessly in a fixed order.

    A checkpoint stores how many batches training has finished. A resumed run continues with the next batch,
    no matter how far the loader had read ahead.

    Args:
        source: A ``.txt``, ``.jsonl``, ``.json``, ``.csv``, ``.tsv`` or ``.parquet`` file (all but the last also
            compressed, ``.txt.gz``), a folder of them, a Hugging Face data set as ``organization/name``, or
            ``shapes``.
        batch_size: Samples per batch on one rank. An update has one batch on each rank, or ``model.accumulate`` of
            them. With ``global_batch_size``, samples that a rank has in memory at once.
        group_size: Samples per prompt, next to each other in the batch; must divide ``batch_size``, or
            ``global_batch_size`` if that is given.
        shuffle_buffer: Number of rows that are read and shuffled together; 0 or 1 keeps the source's order.
        seed: Seed of the order, and of the prompts if the source is ``shapes``; null for ``seed_everything`` of the
            configuration, or 0 without one.
        num_workers: Number of processes that read ahead; it does not affect the order.
        column: Key or column that holds the prompt.
        split: Split of a Hugging Face data set, a folder or ``shapes``.
        global_batch_size: Samples of an update on all ranks together; the update is then the same on any number of
            ranks that divides it into whole groups. Null for ``batch_size`` on each rank.

    Attributes:
        samples: Of an update on this rank, which are handed over as a single batch; see :meth:`divide`.

    Raises:
        UserError: If ``group_size`` does not divide the batch size, the source cannot be read, or it has no prompt.
    """

    def __init__(
        self,
        source: str = "shapes",
        batch_size: Count = 64,
        group_size: Count = 4,
        shuffle_buffer: Whole = 10_000,
        seed: Seed | None = None,
        num_workers: Whole = 0,
        column: str = "prompt",
        split: str = "train",
        global_batch_size: Count | None = None,
    ) -> None:
        super().__init__()
        name, samples = "batch_size", batch_size
        if global_batch_size is not None:
            name, samples = "global_batch_size", global_batch_size
        if samples % group_size:
            raise UserError(
                f"group_size {group_size} does not divide {name} {samples}",
                where="data.group_size",
                remedy=f"{name} must be a multiple of it, such as {-(-samples // group_size) * group_size}",
            )
        self.source, self.column, self.split = source, column, split
        self.batch_size, self.global_batch_size, self.samples = batch_size, global_batch_size, samples
        self.group_size, self.shuffle_buffer = group_size, shuffle_buffer
        self.seed = seed or 0
        self.num_workers = num_workers
        self.prompts = open_source(source, column=column, split=split, seed=self.seed)
        self._handed_over = 0
        self._processed_before: int | None = None

    def divide(self, ranks: int, accumulate: int = 1) -> None:
        """Decide how many samples this rank has in an update; they are handed over as a single batch.

        Args:
            ranks: Their number.
            accumulate: Times ``batch_size`` on each rank, unless ``global_batch_size`` is given.

        Raises:
            UserError: If ``global_batch_size`` cannot be divided into whole groups, or ``accumulate`` is not 1 with it.
        """
        self.samples = samples_of_rank(self.batch_size, self.group_size, self.global_batch_size, ranks, accumulate)

    def train_dataloader(self) -> PromptLoader:
        """Batches from the current position."""
        return PromptLoader(self._stream, self.num_workers)

    def val_dataloader(self) -> list[DataLoader[int]]:
        """One batch without a prompt for ``trainer.validate``, in which callbacks evaluate; none while a run trains."""
        # Not ``trainer.validating``, which is also true while a run that trains asks for these batches.
        if self.trainer is None or self.trainer.state.fn != TrainerFn.VALIDATING:
            return []
        nothing: Any = range(self.trainer.world_size)
        return [DataLoader(nothing)]

    def texts(self) -> Iterator[str]:
        """Texts of one pass over the source; for an endless one, all texts that it draws from."""
        if isinstance(self.prompts, ShapesPrompts):
            split = self.prompts.split
            return (prompt.text for task in TASK_WEIGHTS for prompt in prompts(task, split))
        if isinstance(self.prompts, GenEvalPrompts):
            return (prompt.text for prompt in all_training_prompts())
        return (prompt.text for prompt in self.prompts.read())

    def first_prompts(self, count: int = 1000) -> list[Prompt]:
        """The first prompts of the source, at most ``count``."""
        return list(islice(self.prompts.read(), count))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Count a batch of prompts as handed over to training; it has nothing to move."""
        if isinstance(batch, PromptBatch):
            if self.trainer is not None and self.trainer.training:
                self._handed_over += 1
                self._processed_before = self._processed()
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def batches_consumed(self) -> int:
        """Number of batches on this rank whose training step is over; batches only read do not count."""
        in_step = self._processed_before is not None and self._processed() == self._processed_before
        return self._handed_over - in_step

    def state_dict(self) -> dict[str, Any]:
        """The position, and the settings it depends on."""
        return {"batches": self.batches_consumed, "content": self._content, **self._position_settings()}

    def setup(self, stage: str) -> None:
        """Note the content of the source before training, since the file may change later."""
        if stage == "fit":
            self._content  # noqa: B018

    @cached_property
    def _content(self) -> str:
        return content_of(self.prompts)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue after the batches that a checkpoint has counted.

        Raises:
            UserError: If the checkpoint counted batches under other settings.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            # Evaluation of a checkpoint uses no training prompts, so their settings may differ.
            return
        batches = state_dict.get("batches")
        if type(batches) is not int or batches < 0:
            raise UserError(f"its count of batches is {batches!r}", where="checkpoint", remedy="the file is damaged")
        changed = {
            name: f"{name} {state_dict.get(name)!r} (now {value!r})"
            for name, value in self._position_settings().items()
            # The source may have moved. Checkpoints of earlier versions know it by its name only.
            if state_dict.get(name) != value and (name != "source" or "content" not in state_dict)
        }
        if state_dict.get("content", self._content) != self._content:
            source = f"source {state_dict.get('source')!r} (now {self.source!r}, whose content differs)"
            changed = {"content": source, **changed}
        if changed:
            remedy, samples = "resume with the values of the checkpoint", state_dict.get("batch_size")
            unit = self.group_size * self._ranks
            if "batch_size" in changed:
                now = self.samples * self._ranks
                changed["batch_size"] = f"{samples!r} samples of an update on all ranks (now {now})"
            if list(changed) == ["batch_size"] and type(samples) is int and samples % unit == 0:
                remedy = f"set data.global_batch_size {samples}"  # as many on any number of ranks
            raise UserError(
                f"the checkpoint counts its prompts with {', '.join(changed.values())}",
                where="data",
                remedy=f"{remedy}, or start a new run from its weights",
            )
        self._handed_over, self._processed_before = batches, None

    def forget_counter(self) -> None:
        """Keep the position although the trainer's counters have moved, at the end of a training step."""
        self._processed_before = None

    def _position_settings(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "column": self.column,
            "split": self.split,
            "batch_size": self.samples * self._ranks,
            "group_size": self.group_size,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
        }

    @property
    def _ranks(self) -> int:
        return 1 if self.trainer is None else self.trainer.world_size

    def _processed(self) -> int | None:
        """Number of training steps that the trainer has finished."""
        if self.trainer is None:
            return None
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _stream(self) -> PromptStream:
        return PromptStream(
            self.prompts,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            prompts=self.samples // self.group_size,
            group_size=self.group_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=self._ranks,
            start=self._handed_over,
        )


def _unchanged(batch: Any) -> Any:
    return batch
