"""The precisions of a run as plain dtypes: weights, compute, accumulators of gradients, moments, master copies."""

from __future__ import annotations

from dataclasses import dataclass, replace
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

    def with_moments(self, dtype: Literal["fp32", "bf16"] | None) -> Precision:
        """The same with moments of `dtype`; None leaves them."""
        if dtype is None:
            return self
        return replace(self, moments={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])

    def accumulator(self, micro_batches: int) -> torch.dtype:
        """Dtype in which a route sums a gradient over `micro_batches` backward passes."""
        if self.name == "bf16_papers":
            return torch.bfloat16
        if self.name == "bf16_master" or micro_batches > 1:
            return torch.float32
        return self.weights


def precision_of(name: PrecisionName, rounding: Rounding = "nearest") -> Precision:
    """The dtypes behind a recipe's `run.precision`."""
    weights = torch.float32 if name == "fp32" else torch.bfloat16
    moments = torch.bfloat16 if name == "bf16_papers" else torch.float32
    return Precision(name, weights, moments, has_master=name == "bf16_master", rounding=rounding)
