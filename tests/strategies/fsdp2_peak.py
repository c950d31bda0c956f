"""Builds a frozen network under FSDP2Strategy: ``python fsdp2_peak.py FOLDER``; each rank writes ``peak-RANK.pt``."""

import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import nn
from toy_runs import WORLD, Peak, large

from gdmd_lightning.strategies import FSDP2Strategy, partitions


class Holder(pl.LightningModule):
    """A frozen network with 128 layers of 1 MiB, and one that could learn."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.automatic_optimization = folder, False

    def configure_model(self):
        if hasattr(self, "large"):
            return
        strategy = self.trainer.strategy
        # Whatever the first network allocates once is no part of the second.
        strategy.build(lambda: nn.Linear(512, 512), {"weight": torch.ones(512, 512), "bias": torch.ones(512)})
        with Peak() as peak:
            self.large = strategy.build(large, self.folder / "large.safetensors").requires_grad_(False)
        self.peak = peak.bytes
        self.student = strategy.shard(nn.Linear(8, 8))

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), 0.1)

    def training_step(self, batch, number):
        optimizer = self.optimizers()
        self.manual_backward(self.student(batch).sum())
        optimizer.step()


def main() -> None:
    folder, rank = Path(sys.argv[1]), os.environ["LOCAL_RANK"]
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    module = Holder(folder)
    trainer = pl.Trainer(accelerator="cpu", devices=WORLD, strategy=FSDP2Strategy(), max_steps=1, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 8)))
    found = {"peak": module.peak, "bytes": partitions.bytes_held(module.large)}
    found["sum"] = sum(float(value.sum()) for _, value in trainer.strategy.full_weights(module.large))
    torch.save(found, folder / f"peak-{rank}.pt")


if __name__ == "__main__":
    main()
