"""What yields the batches of a run, and whether the method can learn from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, default_collate

from gdmd_lightning.data.prompt_data import PromptDataModule, PromptLoader
from gdmd_lightning.errors import UserError
from gdmd_lightning.prompts import PromptBatch

if TYPE_CHECKING:
    from gdmd_lightning.methods.lightning import RoleModule

LOADER = (
    "use datamodule=PromptDataModule(...), a DataLoader whose collate_fn returns a PromptBatch, "
    "or DataLoader(batches, batch_size=None)"
)
"""What yields the batches of a run."""


def ask_for_whole_updates(module: RoleModule, data: Any) -> None:
    """Let the data module yield the samples of a whole update at once, so that its position is that of updates.

    Args:
        module: The method, whose micro-batches become those of the data module.
        data: The trainer's data module; ``None`` for none.

    Raises:
        UserError: If the module accumulates batches of something else than a :class:`PromptDataModule`.
    """
    if isinstance(data, PromptDataModule):
        data.divide(module.world_size, module.accumulate)
        if data.samples > data.batch_size:
            module.limit_micro_batches(data.batch_size)
    elif module.accumulate > 1:
        raise UserError(
            f"it is {module.accumulate}, but the batches are not those of a PromptDataModule",
            where="model.accumulate",
            remedy="use a PromptDataModule, or larger batches with model.micro_batch_size",
        )


def check_source(module: RoleModule, data: Any) -> None:
    """Fail, before anything is loaded, if the method cannot learn from the data.

    Args:
        module: The method, with its trainer.
        data: The trainer's data module; ``None`` if it was given a loader.

    Raises:
        UserError: If it cannot.
    """
    if isinstance(data, PromptDataModule):
        module.check_batch(data.samples * module.world_size, data.group_size)
        module.check_prompts(data.first_prompts())
    elif data is None:
        _check_loader(module.trainer.fit_loop._data_source.instance)


def check_fed(module: RoleModule, batch: Any) -> None:
    """Fail if the method cannot learn from a batch of this rank, which a loader of the user may yield.

    Raises:
        UserError: If it cannot.
    """
    if not isinstance(batch, PromptBatch):
        what = f"a batch is a {type(batch).__name__}, not a PromptBatch"
        raise UserError(what, where="trainer.fit", remedy=LOADER)
    module.check_batch(len(batch) * module.world_size, batch.group_size)


def _check_loader(loader: Any) -> None:
    """Refuse what ``trainer.fit`` is given in place of a data module if it cannot yield batches of prompts.

    Raises:
        UserError: If it cannot.
    """
    if isinstance(loader, PromptLoader):
        raise UserError(
            "it has a loader of prompts without its data module, which keeps the position",
            where="trainer.fit",
            remedy="give it datamodule=PromptDataModule(...)",
        )
    if isinstance(loader, list | tuple | dict):
        what = f"it has a {type(loader).__name__}, whose items Lightning takes for loaders of their own"
        raise UserError(what, where="trainer.fit", remedy=LOADER)
    if isinstance(loader, DataLoader) and loader.collate_fn is default_collate:
        raise UserError("the DataLoader's default collate_fn makes no PromptBatch", where="trainer.fit", remedy=LOADER)
