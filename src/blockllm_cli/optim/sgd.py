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
    """One update in place, bit-equal to `torch.optim.SGD`; nothing is read by the host.

    Written as a few foreach calls: the fused kernel is wrong for bf16 on the CPU (torch 2.13 writes garbage into the
    momentum buffer).

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
    weights, gradients, buffers = list(weights), list(gradients), list(momentum_buffers)
    if weight_decay:
        torch._foreach_add_(gradients, weights, alpha=weight_decay)
    if momentum:
        # A buffer of zeros becomes the first gradient by itself.
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
    if momentum and nesterov:
        torch._foreach_add_(gradients, buffers, alpha=momentum)
    torch._foreach_add_(weights, buffers if momentum and not nesterov else gradients, alpha=-lr)


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
