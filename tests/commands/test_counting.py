"""What the benchmarks say about operators: products of matrices apart from everything else."""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from counting import time_in_products


def test_products_of_matrices_attention_and_convolutions_are_counted_and_nothing_else():
    square, rows = torch.randn(256, 256, requires_grad=True), torch.randn(1, 2, 64, 8)
    linear, convolution = torch.nn.Linear(256, 256), torch.nn.Conv2d(2, 2, 3)
    products = {
        "linear": lambda: linear(square).sum().backward(),
        "matmul": lambda: square @ square,
        "bmm": lambda: torch.bmm(rows[0], rows[0].mT),
        "attention": lambda: torch.nn.functional.scaled_dot_product_attention(rows, rows, rows),
        "convolution": lambda: convolution(rows),
    }
    times = {name: time_in_products(work) for name, work in products.items()}
    assert all(0 < time.products <= time.all for time in times.values()), times
    others = time_in_products(lambda: torch.nn.functional.gelu(square).add_(1).sqrt().sum())
    assert others.products == 0 < others.all


def test_time_in_products_is_most_of_a_large_product():
    large = torch.randn(1024, 1024)
    time = time_in_products(lambda: (large @ large).relu())
    assert time.products > 0.5 * time.all, time
    assert f"({time.products / time.all:.0%}) in products of matrices" in str(time)
