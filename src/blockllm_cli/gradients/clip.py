"""The kept norm: the Euclidean norm of everything that one update will write from, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

# On the CPU torch adds up squares in a few running fp32 sums per norm: 3e7 entries at once lose 2e-3 of their norm
# (measured). Rows of this many entries lose less than 1e-6 at the same speed. Its GPU kernels cut by themselves.
_CPU_ROW = 2**10
_CPU_BLOCK = 2**20
"""Entries that are widened to fp32 at a time, 4 MiB: they stay in the last cache, and smaller ones are slower."""


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
        norms = _row_norms(tensors)
    else:
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype=torch.float32))
    total: Tensor = torch.linalg.vector_norm(norms.double())
    return total


def _row_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Norms (fp32, 1-D) of the rows into which the entries of each tensor are cut, its last one shorter."""
    norms: list[Tensor] = []
    rests: list[Tensor] = []
    places: list[int] = []
    wide = _Widened(max(tensor.numel() for tensor in tensors))
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = flat.numel() // _CPU_ROW * _CPU_ROW
        if whole:
            norms += [torch.linalg.vector_norm(part.view(-1, _CPU_ROW), dim=1) for part in wide.parts(flat[:whole])]
        if whole < flat.numel():
            places.append(len(norms))
            norms.append(flat)
            rests.append(flat[whole:].float())
    if rests:
        for place, norm in zip(places, torch._foreach_norm(rests, 2), strict=True):
            norms[place] = norm.view(1)
    return torch.cat(norms) if norms else torch.zeros(1)  # all may be empty


class _Widened:
    """Gives tensors in fp32: themselves, or part by part in one buffer that is used again and again.

    Args:
        entries: of the largest tensor.
    """

    def __init__(self, entries: int) -> None:
        self._entries = min(entries, _CPU_BLOCK)
        self._buffer: Tensor | None = None

    def parts(self, flat: Tensor) -> Iterator[Tensor]:
        """`flat` in parts, each valid until the next is asked for."""
        if flat.dtype == torch.float32:
            yield flat
            return
        if self._buffer is None:
            self._buffer = torch.empty(self._entries)
        for part in torch.split(flat, _CPU_BLOCK):
            yield self._buffer[: part.numel()].copy_(part)


def scale_to(tensors: Iterable[Tensor], norm: float, limit: float) -> None:
    """Scale `tensors` in place by min(1, limit / (norm + 1e-6)), the factor of `torch.nn.utils.clip_grad_norm_`."""
    factor = limit / (norm + 1e-6)
    if factor < 1.0:
        torch._foreach_mul_(list(tensors), factor)
