"""Rotary positions (Su et al., arXiv 2104.09864): pairs of channels turned by an angle that grows with the position.

Channel i is paired with channel i + K/2 of its head, the convention of Hugging Face's weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Turn(NamedTuple):
    """Cosine and sine of the angles of positions 0 .. L - 1.

    Attributes:
        cosine: (L, 1, K/2), dtype of the queries.
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
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies).unsqueeze(1)
        return Turn(angles.cos().to(dtype), angles.sin().to(dtype))


def turned(x: Tensor, turn: Turn) -> Tensor:
    """`x` (B, L, H, K) with the channels of each position turned."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * turn.cosine - second * turn.sine, second * turn.cosine + first * turn.sine), dim=-1)
