"""What a dense update rule offers: one function in place over lists of tensors, and the names of its state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class DenseRule(Protocol):
    """An update that treats every entry alike and needs, per weight, `slots` values of state that start at zero."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the state tensors of each parameter, in torch's words; the first moment, if any, comes first."""

    def apply(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        slots: Sequence[Sequence[Tensor]],
        *,
        step: int,
        lr: float,
    ) -> None:
        """Update `weights` and `slots` in place.

        Args:
            weights: any shapes, all of one dtype and device.
            gradients: as `weights`; may be overwritten.
            slots: for each name of `slots`, its tensors in the order and shapes of `weights`.
            step: number of this update since the state was zero, from 1.
            lr: learning rate.
        """
