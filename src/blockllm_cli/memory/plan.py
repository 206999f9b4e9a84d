"""What a run will hold, tensor by tensor, before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from blockllm_cli.footprint import CATEGORIES, Category, TensorPlan, bytes_by_category
from blockllm_cli.methods.base import Method
from blockllm_cli.optim.precision import Precision

PLANNED: tuple[Category, ...] = (
    "weights",
    "master_weights",
    "gradients",
    "optimizer_state",
    "indices",
    "projectors",
    "quantization",
)
"""Weights and all that methods hold: planned and counted, zero included. The others are null until something does."""


@dataclass(frozen=True)
class Plan:
    """The tensors of a run, exact to the byte for the categories in `PLANNED`.

    Attributes:
        tensors: one entry each.
    """

    tensors: tuple[TensorPlan, ...]

    def by_category(self) -> dict[str, int | None]:
        """Bytes per category, all categories in order; None where nothing is planned."""
        found = bytes_by_category(self.tensors)
        return {name: found.get(name, 0) if name in PLANNED else found.get(name) for name in CATEGORIES}

    @property
    def total_bytes(self) -> int:
        """Bytes of all planned tensors, as if all were alive at once."""
        return sum(tensor.bytes for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Plain values for plan.json: `categories`, `total_bytes`, and each of the `tensors` with its bytes."""
        return {
            "categories": self.by_category(),
            "total_bytes": self.total_bytes,
            "tensors": [
                {**asdict(tensor), "shape": list(tensor.shape), "bytes": tensor.bytes} for tensor in self.tensors
            ],
        }


def plan_run(shapes: Mapping[str, tuple[int, ...]], method: Method, precision: Precision) -> Plan:
    """Plan the weights and all that `method` will hold.

    Args:
        shapes: parameter name -> shape, a tied head left out, as `LlamaConfig.parameter_shapes()` gives them.
        method: not yet prepared; nothing is allocated.
        precision: dtype of the weights.
    """
    dtype = str(precision.weights).removeprefix("torch.")
    weights = [TensorPlan(name, "weights", shape, dtype) for name, shape in shapes.items()]
    return Plan((*weights, *method.plan(shapes)))
