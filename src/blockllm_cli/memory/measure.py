"""Bytes of real tensors, counted at phase borders, and what the operating system says of the process.

Counted are weights, the gradients that routes hold, and what the method holds, each under its category; the figure
kept is the largest at any border. Categories that are not counted are absent. Counting walks the method's tensors only
when an update may have changed them, so it costs microseconds.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from typing import Literal

import psutil
import torch
from torch import nn

from blockllm_cli.footprint import CATEGORIES
from blockllm_cli.memory.plan import PLANNED
from blockllm_cli.methods.base import Method


class MemoryMeter:
    """Keeps the largest bytes per category of one run.

    Args:
        model: its parameters and buffers are the weights.
        method: asked for what it holds.
        peaks: figures of the run so far, when it is resumed.
    """

    def __init__(self, model: nn.Module, method: Method, peaks: Mapping[str, int] | None = None) -> None:
        self._method = method
        self.peaks: dict[str, int] = dict.fromkeys(PLANNED, 0)
        self.peaks.update(peaks or {})
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.parameters()}
        self._raise("weights", sum(storages.values()))
        self._count_method()

    def mark(self, phase: Literal["backward", "update"], gradient_bytes: int) -> None:
        """Note a phase border (see `training.trainer.PhaseProbe`)."""
        self._raise("gradients", gradient_bytes)
        if phase == "update":
            self._count_method()

    def by_category(self) -> dict[str, int | None]:
        """All categories of the design: largest bytes so far, None where nothing counts them."""
        return {category: self.peaks.get(category) for category in CATEGORIES}

    def _count_method(self) -> None:
        now: dict[str, int] = {}
        for held in self._method.held():
            now[held.category] = now.get(held.category, 0) + held.tensor.untyped_storage().nbytes()
        for category, count in now.items():
            self._raise(category, count)

    def _raise(self, category: str, count: int) -> None:
        self.peaks[category] = max(self.peaks.get(category, 0), count)


def process_memory() -> dict[str, int]:
    """Resident bytes of this process, now and at most (`rss_bytes`, `peak_rss_bytes`)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return {
        "rss_bytes": psutil.Process().memory_info().rss,
        "peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024,
    }


def device_peaks(device: torch.device) -> dict[str, int | None]:
    """Largest bytes of the CUDA allocator since the start: handed out to tensors, and reserved from the card."""
    if device.type != "cuda":
        return {"peak_allocated_bytes": None, "peak_reserved_bytes": None}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }
