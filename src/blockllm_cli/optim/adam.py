"""Adam and AdamW (Kingma and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101).

The arithmetic is torch's fused kernel, in torch's form: eps is added to sqrt(v) after the bias correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def adam_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """One update in place, bit-equal to `torch.optim.Adam` / `AdamW` with `fused=True`; nothing is read by the host.

    Args:
        weights: any shapes; all of one dtype (fp32 or bf16) and device.
        gradients: in the shapes, dtype and on the device of `weights`; not modified.
        exp_avgs: first moments, as `weights`.
        exp_avg_sqs: second moments, as `weights`.
        step: number of this update, from 1, for the bias correction.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the corrected second moment.
        weight_decay: factor of the decay.
        decoupled: True: weights shrink by lr * weight_decay before the update (AdamW); False: weight_decay * weight is
            added to the gradient (Adam with L2).
    """
    if not weights:
        return
    # The kernel wants one counter per tensor and only reads it, so all share one. Filling it on the device avoids a
    # copy from the host, which would wait for the device.
    counter = torch.full((), float(step), dtype=torch.float32, device=weights[0].device)
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(
        list(weights),
        list(gradients),
        list(exp_avgs),
        list(exp_avg_sqs),
        [],
        [counter] * len(weights),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


@dataclass(frozen=True)
class AdamRule:
    """`adam_step` with its constants; a `DenseRule`."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    @property
    def slots(self) -> tuple[str, ...]:
        """The two moments."""
        return ("exp_avg", "exp_avg_sq")

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
        exp_avgs, exp_avg_sqs = slots
        adam_step(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            step=step,
            lr=lr,
            betas=self.betas,
            eps=self.eps,
            weight_decay=self.weight_decay,
            decoupled=self.decoupled,
        )
