"""How fast this device multiplies matrices in fp32 and in bf16, which is what `precision = "auto"` goes by."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

# A product of 2 x 1024 x 512 x 512 = 0.54 GFLOP: that of a linear layer of a small model, 2 to 20 ms on one core.
ROWS, WIDTH = 1024, 512
REPEATS = 5
# What is called faster must be so by more than the clock's noise, or the answer would change from run to run.
MARGIN = 1.1


@dataclass(frozen=True)
class ProductSpeed:
    """Measured rates of one matrix product, in floating point operations per second.

    Attributes:
        fp32: inputs and output in fp32.
        bf16: inputs and output in bf16; 0 where the device has no such product.
    """

    fp32: float
    bf16: float

    @property
    def prefers_bf16(self) -> bool:
        """Whether bf16 is faster by more than the noise of the measurement."""
        return self.bf16 > MARGIN * self.fp32


def measure_products(device: torch.device) -> ProductSpeed:
    """Time products in both dtypes in turn, and take the best of each; well below half a second."""
    factors = {}
    for dtype in (torch.float32, torch.bfloat16):
        try:
            left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((ROWS, WIDTH), (WIDTH, WIDTH)))
            torch.mm(left, right)  # the first one loads kernels
        except (RuntimeError, TypeError):
            if dtype == torch.float32:
                raise
            continue
        factors[dtype] = (left, right)
    seconds = dict.fromkeys(factors, float("inf"))
    for _ in range(REPEATS):
        for dtype, (left, right) in factors.items():
            _synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right)
            _synchronize(device)
            seconds[dtype] = min(seconds[dtype], time.perf_counter() - start)
    operations = 2 * ROWS * WIDTH * WIDTH
    return ProductSpeed(
        fp32=operations / seconds[torch.float32], bf16=operations / seconds.get(torch.bfloat16, float("inf"))
    )


def bf16_is_faster(device: torch.device) -> bool:
    """Whether a product in bf16 is measurably faster than in fp32 on `device`."""
    return measure_products(device).prefers_bf16


def _synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; the CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
