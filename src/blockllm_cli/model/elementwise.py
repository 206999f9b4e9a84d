"""Norm and gated activation as autograd functions that keep little for the backward pass.

Written with plain operators, the norm would keep three tensors as large as its input, two of them in fp32, and the
gated activation three; these keep their inputs and make the rest again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockllm_cli.model.autograd import applied


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x` over its root mean square along the last dimension, times `weight` (Zhang and Sennrich, arXiv 1910.07467).

    Statistics and quotient are fp32; the quotient is rounded to the dtype of `x` before it meets `weight`, as in
    Hugging Face's Llama.
    """
    normalised: Tensor = applied(_RMSNorm, x, weight, eps)
    return normalised


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(`gate`) * `up`, elementwise."""
    gated: Tensor = applied(_GatedSilu, gate, up)
    return gated


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, factor)
        return (wide * factor).to(x.dtype).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        normalised = x.float() * factor
        weight_gradient = x_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * normalised).flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            wide = (gradient * weight).float()
            projection = (wide * normalised).mean(-1, keepdim=True)
            x_gradient = wide.addcmul_(normalised, projection, value=-1).mul_(factor).to(x.dtype)
        return x_gradient, weight_gradient, None


class _GatedSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        gate_gradient = torch.ops.aten.silu_backward(gradient * up, gate)
        return gate_gradient, F.silu(gate).mul_(gradient)
