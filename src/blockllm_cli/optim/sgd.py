"""Stochastic gradient descent with momentum, in torch's form: the momentum buffer starts as the first gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def sgd_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
) -> None:
    """One update in place, bit-equal to `torch.optim.SGD` with `fused=True`; nothing is read by the host.

    Args:
        weights: any shapes; all of one dtype (fp32 or bf16) and device.
        gradients: in the shapes, dtype and on the device of `weights`; may be overwritten.
        momentum_buffers: as `weights`, zeros before the first update; empty if `momentum` is 0.
        lr: learning rate.
        momentum: factor of the former buffer: buffer = momentum * buffer + gradient.
        nesterov: move by gradient + momentum * buffer instead of by the buffer.
        weight_decay: weight_decay * weight is added to the gradient.
    """
    if not weights:
        return
    torch._fused_sgd_(
        list(weights),
        list(gradients),
        list(momentum_buffers),
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
        # With dampening 0, a buffer of zeros becomes the gradient by itself.
        is_first_step=False,
    )


@dataclass(frozen=True)
class SgdRule:
    """`sgd_step` with its constants; a `DenseRule`."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def slots(self) -> tuple[str, ...]:
        """The momentum buffer, if there is momentum."""
        return ("momentum_buffer",) if self.momentum else ()

    def apply(
        self,
        weights: Sequence[Tensor],
        gradients: Sequence[Tensor],
        slots: Sequence[Sequence[Tensor]],
        *,
        step: int,
        lr: float,
    ) -> None:
        """See `DenseRule.apply`."""
        sgd_step(
            weights,
            gradients,
            slots[0] if slots else (),
            lr=lr,
            momentum=self.momentum,
            nesterov=self.nesterov,
            weight_decay=self.weight_decay,
        )
