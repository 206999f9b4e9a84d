"""The rule for entries without state: the sign of the gradient, or the gradient over its root mean square.

Beyond the paper. Neither changes when the gradient is scaled, so clipping does not concern them, and they can be
applied inside the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from blockllm_cli.gradients.clip import kept_norm
from blockllm_cli.optim.entries import Entries
from blockllm_cli.optim.precision import Precision
from blockllm_cli.optim.rounding import StochasticRounder
from blockllm_cli.optim.scratch import Scratch, widened
from blockllm_cli.optim.stored import DEVICE_SLICE_ENTRIES, SLICE_ENTRIES


class InactiveRule:
    """Writes w -= rate * scale * u to a piece: u = sign(g), or g / rms(g) with the rms over the entries written.

    Args:
        kind: "sign" or "normalized".
        scale: factor on the rate.
        precision: rounding of bf16 weights; all arithmetic is fp32.
        seed: of stochastic rounding; draws are keyed by (seed, piece, update).
    """

    def __init__(self, kind: Literal["sign", "normalized"], scale: float, precision: Precision, seed: int) -> None:
        self._kind = kind
        self._scale = scale
        self._rounder = StochasticRounder(seed) if precision.rounding == "stochastic" else None

    @torch.no_grad()
    def write(self, weight: Tensor, gradient: Tensor, kept: Sequence[Entries], *, rate: float, key: str) -> Tensor:
        """Update the entries of `weight` that are not in `kept`, unless the gradient is not finite.

        Args:
            weight: a piece, contiguous, fp32 or bf16; written in place.
            gradient: in its shape, fp32 or bf16; overwritten.
            kept: entries of the piece that another rule trains, or none.
            rate: learning rate.
            key: names the draws of stochastic rounding.

        Returns:
            The norm of the whole gradient, float64 scalar on its device; not finite if the piece stayed unmoved.
        """
        norm = kept_norm([gradient])
        numel = weight.numel()
        for entries in kept:
            entries.scatter_(gradient, gradient.new_zeros(entries.count))
            numel -= entries.count
        if numel == 0:
            return norm
        step = self._step_length(gradient, norm, numel, rate, is_whole=not kept)
        if step is None:
            return norm
        weights, gradients = weight.view(-1), gradient.view(-1)
        most = SLICE_ENTRIES if weight.device.type == "cpu" else DEVICE_SLICE_ENTRIES
        scratch = Scratch(min(most, weight.numel()), weight.device)
        for start in range(0, weights.numel(), most):
            part = slice(start, start + most)
            scratch.clear()
            self._write_slice(weights[part], gradients[part], step, key, start, scratch)
        return norm

    def _step_length(self, gradient: Tensor, norm: Tensor, numel: int, rate: float, *, is_whole: bool) -> Tensor | None:
        """What u is multiplied by, an fp32 scalar, 0 for a gradient that is not finite; None if nothing is to be done.

        On the CPU, where reading costs nothing, a gradient that is not finite ends here; elsewhere it is made zero.
        """
        finite = torch.isfinite(norm)
        if gradient.device.type == "cpu":
            if not finite:
                return None
        else:
            torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0, out=gradient)
        length = torch.full_like(norm, rate * self._scale)
        if self._kind == "normalized":
            written = norm if is_whole else kept_norm([gradient])
            length = torch.where(written > 0, length * numel**0.5 / written, 0.0)
        return torch.where(finite, length, 0.0).float()

    def _write_slice(
        self, weight: Tensor, gradient: Tensor, step: Tensor, key: str, start: int, scratch: Scratch
    ) -> None:
        direction = gradient.sign_() if self._kind == "sign" else gradient
        direction = widened(direction, torch.float32, scratch, "direction")
        if weight.dtype == torch.float32:
            weight.addcmul_(direction, step, value=-1.0)
            return
        wide = widened(weight, torch.float32, scratch, "weight").addcmul_(direction, step, value=-1.0)
        if self._rounder is None:
            weight.copy_(wide)
        else:
            self._rounder.write(weight, wide, key, start, scratch)
