"""The rows that every language model here trains on: random ids, the same for all."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from speed.workers.protocol import Spec


def row_ids(spec: Spec) -> Iterator[Tensor]:
    """Without end: int64 (rows, length + 1), so that each of `length` positions has a target."""
    draw = np.random.default_rng(0)
    shape = (spec["rows"], spec["length"] + 1)
    while True:
        yield torch.from_numpy(draw.integers(spec["shape"]["vocab_size"], size=shape))


def dtype_of(precision: str) -> torch.dtype:
    """Element type of the weights: only pure bf16 has them in bf16."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def autocast(precision: str) -> torch.autocast:
    """A region of bf16 products for precision `autocast`, and one without effect for the others."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "autocast")
