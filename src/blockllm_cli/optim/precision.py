"""The precisions of a run as plain dtypes: weights, compute, accumulators of gradients, moments, master copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

PrecisionName = Literal["fp32", "bf16", "bf16_master", "bf16_papers"]
Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class Precision:
    """Element types of one run.

    Attributes:
        name: the word of the recipe (`auto` is decided before this object exists).
        weights: dtype of the model's parameters, and of its products.
        moments: dtype of optimizer moments.
        has_master: whether an fp32 copy is kept of every entry that has optimizer state.
        rounding: how an fp32 result is written into a bf16 weight.
    """

    name: PrecisionName
    weights: torch.dtype
    moments: torch.dtype
    has_master: bool
    rounding: Rounding = "nearest"

    def accumulator(self, micro_batches: int) -> torch.dtype:
        """Dtype in which a route sums a gradient over `micro_batches` backward passes."""
        if self.name == "bf16_papers":
            return torch.bfloat16
        if self.name == "bf16_master" or micro_batches > 1:
            return torch.float32
        return self.weights


def precision_of(name: PrecisionName, rounding: Rounding = "nearest", state_dtype: str | None = None) -> Precision:
    """The dtypes behind a recipe's `run.precision`; `state_dtype` ("fp32" or "bf16") overrides that of the moments."""
    weights = torch.float32 if name == "fp32" else torch.bfloat16
    moments = torch.bfloat16 if name == "bf16_papers" else torch.float32
    if state_dtype is not None:
        moments = {"fp32": torch.float32, "bf16": torch.bfloat16}[state_dtype]
    return Precision(name, weights, moments, has_master=name == "bf16_master", rounding=rounding)
