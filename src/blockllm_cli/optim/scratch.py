"""Workspace that is used again and again within one update: fresh memory costs more than the arithmetic on it."""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """One buffer for each use, cut into 1-D tensors from its start until it is cleared.

    Args:
        entries: of each buffer at first; they grow to what is taken from them at a time.
        device: of all of them.
    """

    def __init__(self, entries: int, device: torch.device) -> None:
        self._entries = entries
        self._device = device
        self._buffers: dict[str, Tensor] = {}
        self._used: dict[str, int] = {}

    def take(self, use: str, entries: int, dtype: torch.dtype) -> Tensor:
        """The next `entries` of the buffer for `use`, which has one dtype; what is in them is garbage."""
        start = self._used.get(use, 0)
        buffer = self._buffers.get(use)
        if buffer is None or start + entries > buffer.numel():
            # Cut before, a former buffer lives on as long as what was cut from it. The next holds all of this round:
            # else every round would make several anew.
            self._entries = max(self._entries, start + entries)
            buffer = self._buffers[use] = torch.empty(self._entries, dtype=dtype, device=self._device)
            start = 0
        self._used[use] = start + entries
        return buffer[start : start + entries]

    def clear(self) -> None:
        """Everything that was taken is free again."""
        self._used.clear()


def widened(tensor: Tensor, dtype: torch.dtype, scratch: Scratch, use: str) -> Tensor:
    """`tensor` in `dtype`: itself, or a copy in `scratch`."""
    return tensor if tensor.dtype == dtype else scratch.take(use, tensor.numel(), dtype).copy_(tensor)
