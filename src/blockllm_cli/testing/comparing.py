"""Which tensors differ between two states or two sets of weights, in words that name them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors of which an entry has changed."""
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """In words, the first key under which two states or sets of weights are not the same to the bit; empty if none."""
    for key in [*one, *(key for key in other if key not in one)]:
        if key not in one or key not in other:
            return f"{key} is on one side only"
        left, right = one[key], other[key]
        if not isinstance(left, Tensor) or not isinstance(right, Tensor):
            if left != right:
                return f"{key} is {shortened(left)} and {shortened(right)}"
        elif left.shape != right.shape or left.dtype != right.dtype:
            return f"{key} is {tuple(left.shape)} {left.dtype} and {tuple(right.shape)} {right.dtype}"
        elif not torch.equal(left, right):
            different = left != right
            largest = (left.double() - right.double()).abs().max().item()
            return f"{key} differs in {int(different.sum())} of {left.numel()} entries, by up to {largest:.3g}"
    return ""


def shortened(value: object) -> str:
    """`value` as text of bounded length."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def norm_of(changes: Iterable[Tensor]) -> float:
    """Euclidean norm over all entries."""
    return math.sqrt(sum(float(change.double().square().sum()) for change in changes))
