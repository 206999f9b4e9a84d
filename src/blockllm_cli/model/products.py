"""Products of matrices by the faster of the two libraries that torch brings along.

In fp32 torch multiplies with MKL, which on processors of another maker than its own does without their 512-bit units.
oneDNN uses them: on an AMD EPYC with AVX-512 it is 2.1 to 2.5 times as fast where no operand has to be laid out anew,
and 1.7 to 2.1 times for the gradient of a weight (`bench/products.py`). In bf16 torch multiplies with oneDNN already.

Which library serves is a function of the processor, dtype and sizes alone, so that a run on one machine repeats itself.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FEWEST_STEPS = 2**22
"""Multiplications below which a call of oneDNN costs more than it saves (measured)."""


def product(left: Tensor, right: Tensor, *, out: Tensor | None = None) -> Tensor:
    """`left` @ `right`.

    Args:
        left: (m, k), fp32 or bf16, any strides.
        right: (k, n), likewise.
        out: (m, n), memory that may be used for the result.

    Returns:
        (m, n), contiguous unless it is `out`.
    """
    if not _by_onednn(left, right):
        return torch.mm(left, right) if out is None else torch.mm(left, right, out=out)
    multiplied: Tensor = torch.ops.mkldnn._linear_pointwise(_row_major(left), _dense(right).t(), None, "none", [], "")
    return multiplied


def has_own_product(like: Tensor) -> bool:
    """Whether `product` may do better than `left @ right` for the dtype and on the device of `like`."""
    return _is_served(like)


def takes_out(like: Tensor) -> bool:
    """Whether `product` makes use of `out` for large matrices of the dtype and on the device of `like`."""
    return not _is_served(like)


def _by_onednn(left: Tensor, right: Tensor) -> bool:
    return _is_served(left) and left.shape[0] * left.shape[1] * right.shape[1] >= _FEWEST_STEPS


def _is_served(like: Tensor) -> bool:
    return like.dtype == torch.float32 and like.device.type == "cpu" and _mkl_is_slow()


def _row_major(matrix: Tensor) -> Tensor:
    """`matrix`, contiguous; a transposed slice of columns is first made dense, since torch transposes that faster."""
    if matrix.is_contiguous():
        return matrix
    return matrix.t().contiguous().t().contiguous() if matrix.stride(0) == 1 else matrix.contiguous()


def _dense(matrix: Tensor) -> Tensor:
    """`matrix` by rows or by columns without gaps, with which oneDNN would take a kernel a hundred times slower."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch multiplies fp32 with MKL on a processor with AVX-512 that is not Intel's."""
    libraries: Any = torch.backends  # untyped in torch
    if not (libraries.mkl.is_available() and libraries.mkldnn.is_available()):
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return _maker() not in ("", "GenuineIntel")


def _maker() -> str:
    """Maker of the processor, such as "AuthenticAMD"; empty where the system does not say."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in described.splitlines() if line.startswith("vendor_id")), "")
