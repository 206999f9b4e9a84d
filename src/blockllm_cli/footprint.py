"""The declaration of a tensor that planning and measuring share: what it is, how large, how long it lives.

A method declares its tensors with `TensorPlan` before anything is allocated; the planner adds the bytes up and the
measurement counts the real tensors under the same category names. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

Category = Literal[
    "weights",
    "master_weights",
    "gradients",
    "gradient_in_flight",
    "optimizer_state",
    "indices",
    "projectors",
    "quantization",
    "activations",
    "logits",
    "workspace",
    "data",
]
CATEGORIES: tuple[Category, ...] = (
    "weights",
    "master_weights",
    "gradients",
    "gradient_in_flight",
    "optimizer_state",
    "indices",
    "projectors",
    "quantization",
    "activations",
    "logits",
    "workspace",
    "data",
)

# Bytes of one element, by the name that torch prints after "torch.".
ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float64": 8, "int32": 4, "int64": 8, "uint8": 1, "int8": 1, "bool": 1}

Lifetime = Literal["run", "update", "pass"]
"""run: from its creation to the end; update: from the first backward pass of an update to its end; pass: one pass."""


@dataclass(frozen=True)
class TensorPlan:
    """One tensor that will exist.

    Attributes:
        name: parameter name, or parameter name and role, such as `lm_head.weight.exp_avg`.
        category: where its bytes are reported.
        shape: its shape.
        dtype: torch's name of the element type without `torch.`, such as `bfloat16`.
        lifetime: how long it is held.
    """

    name: str
    category: Category
    shape: tuple[int, ...]
    dtype: str
    lifetime: Lifetime = "run"

    @property
    def bytes(self) -> int:
        """Size of the elements in bytes (allocator rounding is not included)."""
        return prod(self.shape) * ELEMENT_BYTES[self.dtype]


def bytes_by_category(plans: Iterable[TensorPlan]) -> dict[str, int]:
    """Sum of planned bytes per category; a category that no plan names is absent."""
    total: dict[str, int] = {}
    for plan in plans:
        total[plan.category] = total.get(plan.category, 0) + plan.bytes
    return total
