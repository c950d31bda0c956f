"""Time of a step of torch's fused AdamW over that of its default, and how far their weights are apart.

OMP_NUM_THREADS=1 .venv/bin/python benchmarks/fused_adamw.py [--steps N]

Both step the same weights with the same gradients in turn, on the CPU. Times are medians without the first two steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

SIZES = {"3.5 million in 150": (150, 152), "100 million in 200": (200, 707)}


def weights(count: int, width: int) -> list[nn.Parameter]:
    """Square matrices with gradients."""
    stream = torch.Generator().manual_seed(0)
    found = [nn.Parameter(torch.randn(width, width, generator=stream)) for _ in range(count)]
    for each in found:
        each.grad = torch.randn(each.shape, generator=stream)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print("| parameters | default, ms | fused, ms | ratio | difference over largest weight |\n|---|---|---|---|---|")
    for name, size in SIZES.items():
        both = [weights(*size) for _ in range(2)]
        optimizers = [torch.optim.AdamW(each, lr=1e-4, fused=fused) for each, fused in zip(both, (None, True))]
        seconds: list[list[float]] = [[], []]
        for _ in range(steps):
            for optimizer, taken in zip(optimizers, seconds, strict=True):
                start = time.perf_counter()
                optimizer.step()
                taken.append(time.perf_counter() - start)
        default, fused = (1000 * statistics.median(taken[2:]) for taken in seconds)
        largest = max(float(each.abs().max()) for each in both[0])
        apart = max(float((one - other).abs().max()) for one, other in zip(*both, strict=True))
        print(f"| {name} tensors | {default:.1f} | {fused:.1f} | {fused / default:.2f} | {apart / largest:.1e} |")


if __name__ == "__main__":
    main()
