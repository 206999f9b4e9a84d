"""The kept norm: the Euclidean norm of everything that one update will write from, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# On the CPU torch adds up squares in a few running fp32 sums per norm: 3e7 entries at once lose 2e-3 of their norm
# (measured). Rows of this many entries lose less than 1e-6 at the same speed. Its GPU kernels cut by themselves.
_CPU_ROW = 2**10
_CPU_BLOCK = 2**18
"""Entries that are widened to fp32 at a time: they stay in the cache, and the workspace is 1 MiB."""


def kept_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm over all `tensors` together, a float64 scalar on their device (0 if there are none).

    Norms of parts are taken in fp32 whatever the tensors' dtype and are combined in float64, so that the value depends
    neither on how many tensors there are nor on their sizes, to 1e-6. A non-finite entry makes the result non-finite;
    so does an entry above 1e19, whose square fp32 cannot hold.

    Args:
        tensors: fp32 or bf16, any shapes, all on one device; not modified.
    """
    tensors = list(tensors)
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    if tensors[0].device.type == "cpu":
        norms = torch.cat([norms for tensor in tensors for norms in _row_norms(tensor)])
    else:
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    total: Tensor = torch.linalg.vector_norm(norms.double())
    return total


def _row_norms(tensor: Tensor) -> Iterator[Tensor]:
    """Norms (fp32, 1-D) of the rows into which the tensor's entries are cut, the last one shorter."""
    for block in torch.split(tensor.reshape(-1), _CPU_BLOCK):
        wide = block.float()
        whole = wide.numel() // _CPU_ROW * _CPU_ROW
        if whole:
            yield torch.linalg.vector_norm(wide[:whole].view(-1, _CPU_ROW), dim=1)
        if whole < wide.numel():
            yield torch.linalg.vector_norm(wide[whole:]).view(1)


def scale_to(tensors: Iterable[Tensor], norm: float, limit: float) -> None:
    """Scale `tensors` in place by min(1, limit / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`."""
    factor = limit / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(list(tensors), factor)
