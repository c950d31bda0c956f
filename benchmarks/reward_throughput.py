"""Pictures per second of a reward of CLIP's size with random weights: in batches against one by one, in pairs.

Usage: ``python benchmarks/reward_throughput.py [--reward hpsv2] [--network vit-b-32] [--threads 1] [--pictures 32]
[--profile]``
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from counting import time_in_products

from gdmd_lightning.families.sketch import ARCHITECTURES
from gdmd_lightning.locations import resolve
from gdmd_lightning.prompts import Prompt
from gdmd_lightning.rewards.clip import CLIPScore
from gdmd_lightning.rewards.hpsv2 import HPSv2
from gdmd_lightning.rewards.network import NetworkReward, Precision

LARGE = str(ARCHITECTURES / "openai/clip-vit-large-patch14")
PARTS = ("text", "vision", "rest")


class RandomCLIP(CLIPScore):
    """CLIP with random weights and the tokenizer of Shapes; ViT-B/32 is what ``CLIPConfig`` describes by default."""

    def __init__(self, network: str, dtype: Precision) -> None:
        super().__init__(LARGE, dtype=dtype)
        self.size = network

    def load(self) -> Any:
        from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

        self._tokenizer = CLIPTokenizer.from_pretrained(resolve("package:assets/shapes/tokenizer"), model_max_length=77)
        return CLIPModel(CLIPConfig() if self.size == "vit-b-32" else CLIPConfig.from_pretrained(self.path))


class RandomHPSv2(HPSv2):
    """HPSv2 with random weights and the tokenizer that open_clip brings; it pads all texts to 77 tokens."""

    def __init__(self, network: str, dtype: Precision) -> None:
        architecture = {"vit-b-32": "ViT-B-32", "vit-l-14": "ViT-L-14"}[network]
        super().__init__("xswu/HPSv2", architecture=architecture, dtype=dtype)

    def load(self) -> Any:
        import open_clip

        self._tokenizer = open_clip.get_tokenizer(self.architecture)
        return self._built()


REWARDS: dict[str, Callable[[str, Precision], NetworkReward]] = {"clip": RandomCLIP, "hpsv2": RandomHPSv2}


class Clock:
    """Seconds in the two towers of a CLIP."""

    def __init__(self, network: Any) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        names = ("transformer", "visual") if hasattr(network, "visual") else ("text_model", "vision_model")
        for name, tower in zip(PARTS, map(network.get_submodule, names), strict=False):
            tower.register_forward_pre_hook(lambda *_, name=name: self._add(name, -time.perf_counter()))
            tower.register_forward_hook(lambda *_, name=name: self._add(name, time.perf_counter()))

    def _add(self, name: str, seconds: float) -> None:
        self.seconds[name] += seconds

    def time(self, reward: NetworkReward, images: torch.Tensor, prompts: list[Prompt], size: int) -> dict[str, float]:
        """Milliseconds per picture by part, ``size`` pictures at once."""
        self.seconds = dict.fromkeys(PARTS, 0.0)
        began = time.perf_counter()
        for start in range(0, len(images), size):
            reward.score(images[start : start + size], prompts[start : start + size])
        self.seconds["rest"] = time.perf_counter() - began - sum(self.seconds.values())
        return {name: 1000 * seconds / len(images) for name, seconds in self.seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reward", choices=REWARDS, default="clip")
    parser.add_argument("--network", choices=("vit-b-32", "vit-l-14"), default="vit-l-14")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--pictures", type=int, default=32)
    parser.add_argument("--per_prompt", type=int, default=8, help="pictures of one prompt, as samples and targets")
    parser.add_argument("--side", type=int, default=512, help="height and width of the pictures, in pixels")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="each once more, by kinds of operators")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    reward = REWARDS[options.reward](options.network, options.dtype)
    images = torch.rand(options.pictures, 3, options.side, options.side)
    prompts = [Prompt(f"a red circle {i // options.per_prompt}") for i in range(options.pictures)]
    reward.score(images[:1], prompts[:1])  # loads it
    clock, sizes = Clock(reward.network), (1, options.pictures)
    pairs = [[clock.time(reward, images, prompts, size) for size in sizes] for _ in range(options.pairs)]
    totals = [[sum(times.values()) for times in pair] for pair in pairs]
    for how, number in (("one by one", 0), ("in a batch", 1)):
        parts = {name: statistics.median(pair[number][name] for pair in pairs) for name in PARTS}
        total = statistics.median(pair[number] for pair in totals)
        print(
            f"{how}: {1000 / total:.2f} pictures/s; ms/picture: {total:.0f}",
            *(f"{n} {s:.0f}" for n, s in parts.items()),
        )
    ratios = [one / batch for one, batch in totals]
    print(f"ratio: median {statistics.median(ratios):.2f}, from {min(ratios):.2f} to {max(ratios):.2f}")
    print(
        f"({options.reward}, {options.network}, {options.dtype}, {options.pictures} pictures of "
        f"{options.side}x{options.side}, {options.per_prompt} per prompt, {options.threads} threads, {options.pairs} "
        "pairs)"
    )
    if options.profile:
        for how, size in zip(("one by one", "in a batch"), sizes, strict=True):
            print(f"{how}, profiled: {time_in_products(partial(clock.time, reward, images, prompts, size))}")


if __name__ == "__main__":
    main()
