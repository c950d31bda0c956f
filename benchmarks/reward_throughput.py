"""Pictures per second of a reward of CLIP's size with random weights: in batches against one by one, in pairs.

Usage: ``python benchmarks/reward_throughput.py [--pictures 32] [--per_prompt 8] [--pairs 3]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from gdmd_lightning.families.sketch import ARCHITECTURES
from gdmd_lightning.locations import resolve
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.clip import CLIPScore


class RandomCLIP(CLIPScore):
    """CLIP ViT-L/14 with random weights and the tokenizer of Shapes."""

    def load(self) -> Any:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(resolve("package:assets/shapes/tokenizer"), model_max_length=77)
        return CLIPModel(CLIPConfig.from_pretrained(self.path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--per_prompt", type=int, default=8, help="pictures of one prompt, as samples and targets")
    parser.add_argument("--pairs", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    reward = RandomCLIP(str(ARCHITECTURES / "openai/clip-vit-large-patch14"))
    images = torch.rand(options.pictures, 3, 512, 512)
    prompts = [Prompt(f"a red circle {i // options.per_prompt}") for i in range(options.pictures)]
    reward.score(images[:1], prompts[:1])  # loads it

    def seconds(size: int) -> float:
        began = time.perf_counter()
        for start in range(0, len(images), size):
            reward.score(images[start : start + size], prompts[start : start + size])
        return time.perf_counter() - began

    pairs = [(seconds(1), seconds(len(images))) for _ in range(options.pairs)]
    one, batch = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(alone / together for alone, together in pairs)
    print(f"one by one: {len(images) / one:.2f} pictures/s; in a batch: {len(images) / batch:.2f}; ratio {ratio:.2f}")
    print(
        f"({options.pictures} pictures of 512x512, {options.per_prompt} per prompt, {torch.get_num_threads()} threads)"
    )


if __name__ == "__main__":
    main()
