"""Rotary positions (Su et al., arXiv 2104.09864): pairs of channels turned by an angle that grows with the position.

Channel i is paired with channel i + K/2 of its head, the convention of Hugging Face's weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from blockllm_cli.model.autograd import applied


class Turn(NamedTuple):
    """Cosine and sine of the angles of positions 0 .. L - 1.

    Attributes:
        cosine: (L, K/2), dtype of the queries.
        sine: likewise.
    """

    cosine: Tensor
    sine: Tensor


class Rotary:
    """Makes the angles' cosines and sines in fp32 and keeps them; plain data, no part of a model's state.

    Args:
        head_dim: channels K of a head, even.
        theta: base of the wavelengths.
    """

    def __init__(self, head_dim: int, theta: float) -> None:
        self.head_dim = head_dim
        self.theta = theta
        self._kept: dict[tuple[torch.device, torch.dtype], Turn] = {}

    def turn(self, length: int, device: torch.device, dtype: torch.dtype) -> Turn:
        """The turn of the first `length` positions, rounded to `dtype` once."""
        kept = self._kept.get((device, dtype))
        if kept is None or kept.cosine.shape[0] < length:
            kept = self._make(length, device, dtype)
            self._kept[device, dtype] = kept
        return Turn(kept.cosine[:length], kept.sine[:length])

    # Tensors made in inference mode could not be saved for a later backward pass.
    @torch.inference_mode(False)
    @torch.no_grad()
    def _make(self, length: int, device: torch.device, dtype: torch.dtype) -> Turn:
        channels = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device)
        frequencies = 1.0 / self.theta ** (channels / self.head_dim)
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
        return Turn(angles.cos().to(dtype), angles.sin().to(dtype))


def turned(x: Tensor, turn: Turn) -> Tensor:
    """`x` (B, L, H, K) with the channels of each position turned, as (B, H, L, K)."""
    result: Tensor = applied(_Turned, x.transpose(1, 2), turn.cosine, turn.sine)
    return result


class _Turned(torch.autograd.Function):
    """Turns channel pairs; the backward pass turns back and needs nothing but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        # Laid out as (B, H, L, K), whatever the layout of x: attention wants the positions of a head together.
        return _turn_into(torch.empty(x.shape, dtype=x.dtype, device=x.device), x, cosine, sine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cosine, sine = ctx.saved_tensors
        batch, heads, length, width = gradient.shape
        # Laid out as (B, L, H, K), so that the projection's backward needs no copy.
        turned_back = gradient.new_empty(batch, length, heads, width).transpose(1, 2)
        return _turn_into(turned_back, gradient, cosine, -sine), None, None


def _turn_into(out: Tensor, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    torch.mul(first, cosine, out=out[..., :half]).addcmul_(second, sine, value=-1)
    torch.mul(second, cosine, out=out[..., half:]).addcmul_(first, sine)
    return out
