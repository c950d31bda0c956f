"""Bytes that collectives of an update of GDMD carry on this rank, counted: ``rank_bytes.py PIPELINE STRATEGY FILE``.

Started on each rank by the test of the closed form; strategies are fsdp2 and zero3."""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from counting import Asked
from random_teachers import method
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from gdmd_lightning.configuration.noise import quiet
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.strategies import FSDP2Strategy, MultiEngineDeepSpeedStrategy


class Carried(TorchDispatchMode):
    """Adds up the bytes of the largest tensors of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            sizes = [t.numel() * t.element_size() for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
            self.bytes[func._schema.name] += max(sizes, default=0)
        return func(*args, **(kwargs or {}))


class Counting(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, index: int) -> None:
        self.asked, self.mode = Asked(module), Carried()
        self.mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.mode.__exit__(None, None, None)


def main() -> None:
    pipeline, name, file = sys.argv[1:]
    torch.set_num_threads(1)
    quiet()
    config = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    strategy = FSDP2Strategy() if name == "fsdp2" else MultiEngineDeepSpeedStrategy(stage=3, config=config)
    module, counting = method("GDMD", pipeline, 2, 2, 2), Counting()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=1,
        max_epochs=-1,
        logger=False,
        callbacks=[counting],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PromptDataModule("shapes", batch_size=8, group_size=4))
    asked = {n: [c.calls, c.learning] for n, c in counting.asked.networks.items()}
    Path(f"{file}-{os.environ['LOCAL_RANK']}").write_text(json.dumps({"bytes": counting.mode.bytes, "asked": asked}))


if __name__ == "__main__":
    main()
