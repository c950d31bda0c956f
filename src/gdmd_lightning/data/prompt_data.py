"""Prompts for training as Lightning wants them, with a position that a checkpoint holds exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from gdmd_lightning.data.readers import ShapesPrompts, open_source
from gdmd_lightning.data.stream import PromptStream
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import PromptBatch
from gdmd_lightning.shapes.captions import TASK_WEIGHTS, prompts


class PromptLoader:
    """Yields the batches of a stream; each iterator starts where training stands when the iterator starts.

    Lightning asks for a new iterator every epoch, and its epochs have nothing to do with passes over the prompts.

    Args:
        stream: Makes the stream at the current position.
        num_workers: Processes that read; with 0 the training process reads.
    """

    def __init__(self, stream: Callable[[], PromptStream], num_workers: int) -> None:
        self.stream, self.num_workers = stream, num_workers

    def __iter__(self) -> Iterator[PromptBatch]:
        loader = DataLoader(
            self.stream(),
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=_unchanged,
            # A generator of its own: by default every new iterator draws from torch's global random stream.
            generator=torch.Generator(),
        )
        for batch in loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


class InTransit:
    """A batch between the loader and ``transfer_batch_to_device``, opaque to Lightning.

    In between, the precision plugins (``bf16-true``, DeepSpeed, FSDP) walk into every dataclass to convert its
    tensors, and refuse a frozen one.
    """

    def __init__(self, batch: PromptBatch) -> None:
        self.batch = batch


class InTransitLoader:
    """A loader's batches, each made opaque on its way through a trainer."""

    def __init__(self, loader: Iterable[PromptBatch]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[InTransit]:
        return map(InTransit, self.loader)


class PromptDataModule(LightningDataModule):
    """Training prompts from a file, a Hugging Face data set or the Shapes world, endlessly and in a fixed order.

    A checkpoint holds how many batches training has finished; a run resumed from it goes on with the next one,
    whatever the loader had read ahead.

    Args:
        source: A ``.txt``, ``.jsonl``, ``.csv`` or ``.parquet`` file, ``organisation/name`` of a Hugging Face data
            set, or ``shapes``.
        batch_size: Samples an update on one rank.
        group_size: Samples a prompt, one after another in the batch; divides ``batch_size``.
        shuffle_buffer: Rows that are read and shuffled together; 0 or 1 keeps the source's order.
        seed: Seed of the order (and of the prompts, where the source is ``shapes``).
        num_workers: Processes that read ahead; they do not change the order.
        column: The key or column that holds the prompt.
        split: The split of a Hugging Face data set or of ``shapes``.

    Raises:
        UserError: A number makes no sense, or the source cannot be read or has no prompt.
    """

    def __init__(
        self,
        source: str = "shapes",
        batch_size: int = 64,
        group_size: int = 4,
        shuffle_buffer: int = 10_000,
        seed: int = 0,
        num_workers: int = 0,
        column: str = "prompt",
        split: str = "train",
    ) -> None:
        super().__init__()
        for name, number, least in [
            ("batch_size", batch_size, 1),
            ("group_size", group_size, 1),
            ("shuffle_buffer", shuffle_buffer, 0),
            ("num_workers", num_workers, 0),
        ]:
            if number < least:
                raise UserError(f"{name} is {number}", where=f"data.{name}", remedy=f"it must be at least {least}")
        if batch_size % group_size:
            raise UserError(
                f"group_size {group_size} does not divide batch_size {batch_size}",
                where="data.group_size",
                remedy=f"batch_size must be a multiple of it, such as {-(-batch_size // group_size) * group_size}",
            )
        self.source, self.column, self.split = source, column, split
        self.batch_size, self.group_size, self.shuffle_buffer, self.seed = batch_size, group_size, shuffle_buffer, seed
        self.num_workers = num_workers
        self.prompts = open_source(source, column=column, split=split, seed=seed)
        self._handed_over = 0
        self._processed_before: int | None = None

    def train_dataloader(self) -> PromptLoader | InTransitLoader:
        """The batches from the current position on: ``PromptBatch`` objects, opaque ones for a trainer."""
        loader = PromptLoader(self._stream, self.num_workers)
        return loader if self.trainer is None else InTransitLoader(loader)

    def texts(self) -> Iterator[str]:
        """The texts of one pass over the source; of the Shapes world, where a pass has no end, those it draws from."""
        if isinstance(self.prompts, ShapesPrompts):
            split = self.prompts.split
            return (prompt.text for task in TASK_WEIGHTS for prompt in prompts(task, split))
        return (prompt.text for prompt in self.prompts.read())

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave prompts where they are, and note that training got a batch."""
        if isinstance(batch, InTransit):
            self._handed_over += 1
            self._processed_before = self._processed()
            return batch.batch
        if isinstance(batch, PromptBatch):
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    @property
    def batches_consumed(self) -> int:
        """Batches whose training step is over, on this rank; what was only read ahead does not count."""
        in_step = self._processed_before is not None and self._processed() == self._processed_before
        return self._handed_over - in_step

    def state_dict(self) -> dict[str, Any]:
        """The position, and all that gives it a meaning."""
        return {"batches": self.batches_consumed, **self._meaning()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on after the batches of a checkpoint.

        Raises:
            UserError: The checkpoint counted other batches than this run would.
        """
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            # Evaluating a checkpoint needs no training prompts, so these may differ.
            return
        changed = [
            f"{name} {state_dict.get(name)!r} (now {value!r})"
            for name, value in self._meaning().items()
            if state_dict.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the checkpoint counts its prompts with {', '.join(changed)}",
                where="data",
                remedy="resume with the values of the checkpoint, or begin a new run from its weights",
            )
        self._handed_over, self._processed_before = state_dict["batches"], None

    def _meaning(self) -> dict[str, Any]:
        return {
            "source": self.source,
            "column": self.column,
            "split": self.split,
            "batch_size": self.batch_size,
            "group_size": self.group_size,
            "shuffle_buffer": self.shuffle_buffer,
            "seed": self.seed,
            "world_size": 1 if self.trainer is None else self.trainer.world_size,
        }

    def _processed(self) -> int | None:
        """Steps that the trainer has done; it counts one up when a step is over."""
        if self.trainer is None:
            return None
        total: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(total.processed)

    def _stream(self) -> PromptStream:
        return PromptStream(
            self.prompts,
            seed=self.seed,
            shuffle_buffer=self.shuffle_buffer,
            prompts=self.batch_size // self.group_size,
            group_size=self.group_size,
            rank=0 if self.trainer is None else self.trainer.global_rank,
            world_size=1 if self.trainer is None else self.trainer.world_size,
            start=self._handed_over,
        )


def _unchanged(batch: Any) -> Any:
    return batch
