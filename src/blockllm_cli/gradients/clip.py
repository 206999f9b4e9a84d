"""The kept norm: the Euclidean norm of everything that one update will write from, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# torch sums squares on the CPU in fp32 within a few running sums per call: 3e7 entries at once lose 2e-3 of the norm,
# slices of this size 2e-7, for a fifth more time (measured). Its GPU kernel cuts tensors by itself.
_CPU_SLICE = 2**16


def kept_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all `tensors` together, a float64 scalar on their device (0 if there are none).

    Norms of slices are taken in fp32 whatever the tensors' dtype and are combined in float64, so that the value depends
    neither on how many tensors there are nor on their sizes, to about 1e-6. A non-finite entry makes the result
    non-finite; so does an entry above 1e19, whose square fp32 cannot hold.

    Args:
        tensors: fp32 or bf16, any shapes, all on one device; not modified.
    """
    parts: list[Tensor] = []
    for tensor in tensors:
        parts += torch.split(tensor.reshape(-1), _CPU_SLICE) if tensor.device.type == "cpu" else (tensor,)
    if not parts:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(parts, 2, dtype=torch.float32)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms).double())
    return total


def scale_to(tensors: Iterable[Tensor], norm: float, limit: float) -> None:
    """Scale `tensors` in place by min(1, limit / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`."""
    factor = limit / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(list(tensors), factor)
