"""Seeds that derive from `run.seed`: one stream each for weights, data order and method, none tied to another."""

from __future__ import annotations

import hashlib
from typing import Literal

Stream = Literal["model", "data", "method"]


def derived_seed(seed: int, stream: Stream) -> int:
    """A 32-bit seed for `stream`; the same for equal arguments on every machine, unrelated for different ones."""
    digest = hashlib.sha256(f"blockllm {stream} {seed}".encode()).digest()
    return int.from_bytes(digest[:4], "big")
