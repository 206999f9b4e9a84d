"""Products in fp32 by torch's own path and by the one the model takes, forward, for the input and for the weight.

    python bench/products.py
    OMP_NUM_THREADS=1 python bench/products.py

Rates are those of the fastest of several interleaved repeats, in GFLOP/s. Where the processor is one that MKL serves
well both paths are the same and the ratios are 1.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from blockllm_cli.heap import keep_memory
from blockllm_cli.model.products import product

SHAPES = ((1024, 512, 512), (1024, 512, 1376), (1024, 1376, 512), (512, 512, 32000))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, GFLOP/s")
    print(f"{'tokens, in, out':<20}{'product':<10}{'torch':>8}{'ours':>8}{'ratio':>8}")
    for tokens, inputs, outputs in SHAPES:
        x, weight, gradient = torch.randn(tokens, inputs), torch.randn(outputs, inputs), torch.randn(tokens, outputs)
        operands = {"forward": (x, weight.t()), "input": (gradient, weight), "weight": (gradient.t(), x)}
        for name, (left, right) in operands.items():
            plain, ours = fastest(left, right, options.repeats)
            work = 2e-9 * tokens * inputs * outputs
            print(
                f"{f'{tokens}, {inputs}, {outputs}':<20}{name:<10}{work / plain:>8.0f}{work / ours:>8.0f}"
                f"{plain / ours:>8.2f}"
            )


def fastest(left: Tensor, right: Tensor, repeats: int) -> tuple[float, float]:
    """Seconds of the fastest product by torch's path, and by ours."""
    versions: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (torch.mm, product)
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for version, taken in zip(versions, seconds, strict=True):
            start = time.perf_counter()
            version(left, right)
            taken.append(time.perf_counter() - start)
    return min(seconds[0]), min(seconds[1])


if __name__ == "__main__":
    keep_memory()
    main()
