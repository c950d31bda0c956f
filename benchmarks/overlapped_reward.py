"""Time of an update of GDMD whose reward is asked while the fake score learns, against one after the other, in pairs.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/overlapped_reward.py [--pairs N] [--batch_size B] [--layers L] [--heads H]

The reward is OCR, which always runs on the CPU. Its networks and torch have one thread each, so two cores are needed.
The teacher is an SD3 with random weights at 32x32 pixels.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from random_teachers import method, train, write_pipeline
from rapidocr import RapidOCR

from gdmd_lightning.methods.settings import Speed
from gdmd_lightning.rewards.ocr import OCRReward

WARM_UP = 2


class InTurn(pl.Callback):
    """Overlaps the reward in every second update, and keeps the seconds of all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.reward: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        module.speed = Speed(overlap_reward=module.updates % 2 == 1)
        self.since = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        self.seconds.append(time.perf_counter() - self.since)
        self.reward.append(float(trainer.logged_metrics["train/seconds/reward"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=8, help="samples per update, in groups of 4, 2 targets each")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=16, help="each 32 wide")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        prompts = Path(directory) / "prompts.txt"
        prompts.write_text("\n".join(f'a shop with the sign "{word}"' for word in ("OPEN", "BREAD", "BOOKS", "TEA")))
        module = method("GDMD", write_pipeline(Path(directory) / "pipeline", options.layers, options.heads))
        reward, watch = OCRReward(), InTurn()
        one_thread = {"EngineConfig.onnxruntime.intra_op_num_threads": 1}
        reward._reader = RapidOCR(params={"Global.log_level": "critical", **one_thread})
        module.judge.reward = reward
        train(module, 2 * options.pairs + WARM_UP, options.batch_size, 4, watch, source=str(prompts))
    after, during = (watch.seconds[WARM_UP + turn :: 2] for turn in (0, 1))
    waits = [statistics.median(watch.reward[WARM_UP + turn :: 2]) for turn in (0, 1)]
    ratios = [b / a for a, b in zip(after, during, strict=True)]
    print(f"one after the other: {statistics.median(after):.2f} s per update, {waits[0]:.2f} s of it in the reward")
    print(f"overlapped: {statistics.median(during):.2f} s per update, {waits[1]:.2f} s of it waiting for the reward")
    print(f"ratio: median {statistics.median(ratios):.3f}, from {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
