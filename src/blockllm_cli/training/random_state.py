"""The generators of the process, in and out of a checkpoint.

Nothing in this package draws from them: weights, data order and methods use keyed generators of their own. They are
seeded and saved for methods from outside that do.
"""

from __future__ import annotations

import random
from typing import Any

import torch


def seed_random_state(seed: int) -> None:
    """Seed Python's and torch's generators."""
    random.seed(seed)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """State of every generator a third-party method may draw from, as plain values."""
    version, internal, gauss = random.getstate()
    state: dict[str, Any] = {
        "python": [version, list(internal), gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if torch.cuda.is_available():
        state["cuda"] = [each.numpy().tobytes().hex() for each in torch.cuda.get_rng_state_all()]
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Put `random_state()` back; CUDA generators only where the devices are the same number."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(_generator_state(state["torch"]))
    saved = state.get("cuda", [])
    if saved and torch.cuda.is_available() and torch.cuda.device_count() == len(saved):
        torch.cuda.set_rng_state_all([_generator_state(each) for each in saved])


def _generator_state(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
