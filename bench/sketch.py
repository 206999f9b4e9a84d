"""The sketch of a gradient: what it costs beside the product that makes the gradient, and how far its norm is off.

OMP_NUM_THREADS=1 python bench/sketch.py
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from blockllm_cli.gradients.sketch import SIZE, Sketch, sketch_bytes

TOKENS = 8192
MADE = 1024
"""Tokens of the product that is timed; that of `TOKENS` takes as many times as long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=200)
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; {SIZE} buckets, {TOKENS} tokens")
    for rows, columns in ((512, 1376), (2048, 5632)):
        for dtype in (torch.float32, torch.bfloat16):
            print_cost(rows, columns, dtype, options.repeats)
    for name, gradient in structures():
        print_error(name, gradient, options.seeds)


def print_cost(rows: int, columns: int, dtype: torch.dtype, repeats: int) -> None:
    """Time one sketch and one product in turn; the fastest of each counts."""
    gradient = torch.randn(rows, columns).to(dtype)
    outputs, inputs = torch.randn(MADE, rows).to(dtype), torch.randn(MADE, columns).to(dtype)

    def sketch() -> None:
        Sketch(SIZE, 1, "key").accept(gradient)

    sketched, made = 1e9, 1e9
    for _ in range(repeats):
        sketched = min(sketched, seconds(sketch))
        made = min(made, seconds(lambda: outputs.t() @ inputs) * TOKENS / MADE)
    each = sketched / gradient.numel() * 1e9
    print(
        f"{rows} x {columns} {str(dtype).removeprefix('torch.'):8}: {each:.2f} ns an entry, "
        f"{sketched / made:.1%} of the product, {sketch_bytes(gradient.numel()) / 1024:.0f} KiB"
    )


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def structures() -> Iterator[tuple[str, Tensor]]:
    """Gradients that a sketch could misjudge, 1024 x 1024."""
    draw = torch.Generator().manual_seed(0)
    yield "normal", torch.randn(1024, 1024, generator=draw)
    yield "rank one", torch.outer(torch.randn(1024, generator=draw), torch.randn(1024, generator=draw))
    column = torch.zeros(1024, 1024)
    column[:, 17] = torch.randn(1024, generator=draw)
    yield "one column", column
    heavy = torch.randn(1024, 1024, generator=draw) * torch.randn(1024, generator=draw).mul_(2).exp_()
    yield "heavy columns", heavy


def print_error(name: str, gradient: Tensor, seeds: int) -> None:
    """Root mean square of the norm's relative error over seeds, with a prime and a round number of buckets."""
    norm = torch.linalg.vector_norm(gradient.double())
    found = []
    for size in (SIZE, 1024):
        estimates = []
        for seed in range(seeds):
            sketch = Sketch(size, seed, "key")
            sketch.accept(gradient)
            estimates.append(sketch.norm_squared().sqrt() / norm - 1)
        found.append(f"{float(torch.stack(estimates).square().mean().sqrt()):.1%} with {size} buckets")
    print(f"norm of {name}: off by {', '.join(found)}")


if __name__ == "__main__":
    main()
