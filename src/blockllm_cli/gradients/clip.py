"""The kept norm: the Euclidean norm of everything that one update will write from, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def kept_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all `tensors` together, a float64 scalar on their device (0 if there are none).

    Each tensor's norm is taken in fp32 at least and the norms are combined in float64, so that the value does not
    depend on how many tensors there are. A non-finite entry makes the result non-finite.
    """
    norms = torch._foreach_norm(list(tensors), 2, dtype=torch.float32)
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms).double())
    return total


def scale_to(tensors: Iterable[Tensor], norm: float, limit: float) -> None:
    """Scale `tensors` in place by min(1, limit / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`."""
    factor = limit / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(list(tensors), factor)
