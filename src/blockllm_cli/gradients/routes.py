"""Where the gradient of one parameter goes during one pass.

A route is handed the gradient of each micro-batch the moment it exists and keeps what its rule needs. Every route that
accumulates is linear, so what it holds after the last micro-batch does not depend on how the batch was cut. A parameter
without a route is frozen: autograd makes no weight-gradient product for it and need not save that product's input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor


class Route(ABC):
    """Keeps something of one parameter's gradient, summed over the micro-batches of a pass.

    Attributes:
        writes: whether `accept` writes weights, so that the loss has to be looked at before the backward pass.
    """

    writes: ClassVar[bool] = False

    @abstractmethod
    def accept(self, gradient: Tensor) -> None:
        """Take the gradient of one micro-batch, in the parameter's shape and dtype; the route owns it from here on."""

    @abstractmethod
    def result(self) -> Tensor | None:
        """What is kept after the last micro-batch, or None if no micro-batch reached the parameter."""

    @abstractmethod
    def held_bytes(self) -> int:
        """Bytes that the route holds now."""


class Dense(Route):
    """Keeps the full gradient, summed.

    Args:
        dtype: element type of the sum; None keeps that of the gradient. With an equal dtype the first gradient itself
            becomes the accumulator, so a single micro-batch costs no copy. That is safe because autograd hands a leaf
            a buffer of its own, copying one that is still in use elsewhere; only a part of a larger buffer (the
            gradient of `cat`, say) comes as it is, and is copied here, so that the rest of the buffer is not held.
    """

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self._dtype = dtype
        self._sum: Tensor | None = None

    def accept(self, gradient: Tensor) -> None:
        """Add `gradient` to the sum in the accumulator's dtype."""
        if self._sum is None:
            total = gradient if self._dtype is None else gradient.to(self._dtype)
            self._sum = total if total.untyped_storage().nbytes() == total.nbytes else total.clone()
        else:
            self._sum.add_(gradient)

    def result(self) -> Tensor | None:
        """The summed gradient, in the parameter's shape and the accumulator's dtype."""
        return self._sum

    def held_bytes(self) -> int:
        """Bytes of the accumulator."""
        return 0 if self._sum is None else self._sum.untyped_storage().nbytes()
