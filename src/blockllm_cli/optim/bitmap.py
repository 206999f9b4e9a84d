"""Sets of positions as bits: packed, counted, and expanded to positions again slice by slice.

The lowest bit of a byte stands for its first position. Slices are of bounded size, so that no flag or position of more
than one slice exists at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SLICE = 2**18
"""Positions of a bitmap that are expanded at a time: 256 KiB of flags and at most 2 MiB of positions."""


def packed(positions: Tensor, units: int) -> Tensor:
    """A bit for each of `units`, set where `positions` (int64, ascending, each once) are; uint8 (ceil(units / 8),)."""
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=positions.device)
    parts = []
    for start in range(0, units, SLICE):
        size = min(SLICE, units - start)
        flags = torch.zeros(-(-size // 8) * 8, dtype=torch.uint8, device=positions.device)
        inside = torch.searchsorted(positions, torch.tensor([start, start + size], device=positions.device))
        flags[positions[inside[0] : inside[1]] - start] = 1
        parts.append((flags.view(-1, 8) * weights).sum(1, dtype=torch.uint8))
    return torch.cat(parts)


def slice_counts(bitmap: Tensor) -> list[int]:
    """Bits set in each slice, read in one transfer."""
    counts = [flags.count_nonzero() for _, flags in _flags(bitmap)]
    return [int(count) for count in torch.stack(counts).tolist()] if counts else []


def expanded(bitmap: Tensor, counts: list[int]) -> Iterator[Tensor]:
    """The set positions of each slice, int64, ascending.

    Args:
        bitmap: uint8.
        counts: of its slices, so that the host need not wait for the device.
    """
    if is_on_host(bitmap):
        yield from _expanded_on_host(bitmap)
        return
    for (start, flags), count in zip(_flags(bitmap), counts, strict=True):
        yield torch.nonzero_static(flags, size=count).view(-1) + start


def is_on_host(tensor: Tensor) -> bool:
    """Whether the host reads `tensor` without waiting."""
    return tensor.device.type == "cpu"


def set_positions(flags: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Where `flags` (1-D) are set, ascending; on a CPU several times faster than torch's search (measured).

    NumPy's search has a loop without branches, 0.35 ns for each flag, and one that is taken where a tenth of the flags
    or less is set: faster where far less is, but half as fast in between. There an eighth of flags that are set is put
    behind, which keeps it to the first loop, and what is found of these is cut off.
    """
    count = np.count_nonzero(flags)
    if not flags.size // 40 < count <= flags.size // 10:
        return np.flatnonzero(flags)
    padded = np.ones(flags.size + flags.size // 8 + 1, dtype=np.bool_)
    padded[: flags.size] = flags
    return np.flatnonzero(padded)[:count]


def _expanded_on_host(bitmap: Tensor) -> Iterator[Tensor]:
    for start in range(0, 8 * bitmap.numel(), SLICE):
        flags = np.unpackbits(bitmap[start // 8 : (start + SLICE) // 8].numpy(), bitorder="little")
        positions = torch.from_numpy(set_positions(flags.view(np.bool_)))
        yield positions.add_(start) if start else positions


def _flags(bitmap: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, a uint8 flag for each position) of consecutive slices."""
    bits = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    for start in range(0, bitmap.numel(), SLICE // 8):
        part = bitmap[start : start + SLICE // 8]
        yield start * 8, (part.unsqueeze(1) >> bits).bitwise_and_(1).view(-1)
