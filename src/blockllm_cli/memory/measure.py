"""Bytes of real tensors, counted at phase borders, and what the operating system says of the process.

Counted are weights, the gradients that routes hold, and what the method holds, each under its category; the figure
kept is the largest at any border. Categories that are not counted are absent. Counting walks the method's tensors only
when an update may have changed them, so it costs microseconds. What is counted may not exceed what was planned.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Mapping
from typing import Literal

import psutil
import torch
from torch import Tensor, nn

from blockllm_cli.errors import GuardError
from blockllm_cli.footprint import CATEGORIES
from blockllm_cli.memory.plan import PLANNED, Plan
from blockllm_cli.methods.base import Method


class MemoryMeter:
    """Keeps the largest bytes per category of one run, and holds them against the plan.

    Args:
        model: its parameters are the weights.
        method: asked for what it holds.
        plan: upper bound of each category that is counted; without one nothing is refused.
        step: updates done before.
        peaks: figures of the run so far, when it is resumed.

    Raises:
        GuardError: more is held than was planned.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        plan: Plan | None = None,
        *,
        step: int = 0,
        peaks: Mapping[str, int] | None = None,
    ) -> None:
        self._method = method
        self._planned = plan.by_category() if plan is not None else {}
        self._step = step
        self.peaks: dict[str, int] = dict.fromkeys(PLANNED, 0)
        self.peaks.update(peaks or {})
        self._raise("weights", storage_bytes(model.parameters()), "before the first update of this process")
        self._count_method("before the first update of this process")

    def mark(self, phase: Literal["backward", "update"], gradient_bytes: int) -> None:
        """Note a phase border (see `training.trainer.PhaseProbe`).

        Raises:
            GuardError: more is held than was planned.
        """
        when = f"after {'a backward pass' if phase == 'backward' else 'the writes'} of update {self._step + 1}"
        self._raise("gradients", gradient_bytes, when)
        if phase == "update":
            self._count_method(when)
            self._step += 1

    def by_category(self) -> dict[str, int | None]:
        """All categories of the design: largest bytes so far, None where nothing counts them."""
        return {category: self.peaks.get(category) for category in CATEGORIES}

    def _count_method(self, when: str) -> None:
        now: dict[str, list[Tensor]] = {}
        for held in self._method.held():
            now.setdefault(held.category, []).append(held.tensor)
        for category, tensors in now.items():
            self._raise(category, storage_bytes(tensors), when)

    def _raise(self, category: str, count: int, when: str) -> None:
        self.peaks[category] = max(self.peaks.get(category, 0), count)
        planned = self._planned.get(category)
        if planned is not None and count > planned:
            raise GuardError(
                f"method {self._method.name} holds more than it planned: {category} are {count:,} bytes {when}, "
                f"{planned:,} in plan.json, which is an upper bound. The fault is in the method, not in the recipe: "
                "report it with recipe.toml and plan.json. Until it is mended, take another method or another of its "
                "options; checkpoints from before are whole"
            )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind `tensors`; storage that several of them share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


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
