"""The gradient of the head, or of some of its rows, summed over the chunks of a batch.

Letters: n tokens of a chunk, D hidden size, V vocabulary, R rows that are wanted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from blockllm_cli.model.linears import Wanted, pick_columns
from blockllm_cli.model.products import product

_CACHE_BYTES = 2**20
"""On CPU work is done on groups of rows of this size, which stay in a core's second-level cache."""


def cached_rows(columns: int, like: Tensor) -> int:
    """Rows of `columns` fp32 values that are worked on together: as many as the cache holds on CPU, else all."""
    return max(1, _CACHE_BYTES // (4 * columns)) if like.device.type == "cpu" else sys.maxsize


class HeadSum:
    """The sum for the wanted rows: fp32 over several chunks; that of a single chunk has the head's dtype.

    Args:
        head: (V, D).
        wanted: rows, or None for all.
        num_chunks: how many will come; with none the sum is zero.
    """

    def __init__(self, head: Tensor, wanted: Wanted | None, *, num_chunks: int) -> None:
        self.wanted = wanted
        self._places = _places(wanted, head)
        self.is_single = num_chunks == 1
        self._sum: Tensor | None = None
        if num_chunks == 0:
            self._sum = torch.zeros_like(head if wanted is None else head[wanted])

    def add(self, gradient: Tensor, hidden: Tensor) -> None:
        """Add `gradient`^T `hidden`: (n, V) and (n, D), of the head's dtype."""
        columns = pick_columns(gradient, self.wanted)
        if self.is_single:
            self._sum = product(columns.t(), hidden)
            return
        is_first = self._sum is None
        if self._sum is None:
            self._sum = hidden.new_empty(columns.shape[1], hidden.shape[1], dtype=torch.float32)
        # Products are added while they are in the cache; adding the whole took as long as making it.
        rows = cached_rows(hidden.shape[1], columns)
        for start in range(0, self._sum.shape[0], rows):
            made = product(columns[:, start : start + rows].t(), hidden)
            part = self._sum[start : start + rows]
            part.copy_(made) if is_first else part.add_(made)

    def add_at(self, targets: Tensor, values: Tensor) -> None:
        """Add rows `values` (n, D), fp32, to the rows `targets` (n,), those that are not wanted excepted."""
        assert self._sum is not None
        if self._places is None:
            self._sum.index_add_(0, targets, values)
            return
        places = self._places[targets]
        self._sum.index_add_(0, places.clamp(min=0), values * (places >= 0).unsqueeze(1))

    def result(self) -> Tensor:
        """The sum, (R, D)."""
        assert self._sum is not None
        return self._sum


def _places(wanted: Wanted | None, head: Tensor) -> Tensor | None:
    """For each row of the head where it stands among the wanted ones, or -1; int64 (V,)."""
    if wanted is None:
        return None
    places = torch.full(head.shape[:1], -1, dtype=torch.int64, device=head.device)
    places[wanted] = torch.arange(places[wanted].numel(), device=head.device)
    return places


def add_chunk(
    sums: Sequence[HeadSum], gradient: Tensor, hidden: Tensor, targets: Tensor, losses: Tensor, scale: float
) -> None:
    """Add one chunk's share to every sum; `gradient` (n, V) is overwritten if there are more chunks than one."""
    if gradient.dtype == torch.float32 or sums[0].is_single:
        for each in sums:
            each.add(gradient, hidden)
        return
    ones = _split_off_targets(gradient, targets, losses, scale)
    values = hidden * (ones * -scale).unsqueeze(1)
    for each in sums:
        each.add(gradient, hidden)
        each.add_at(targets, values)


def _split_off_targets(gradient: Tensor, targets: Tensor, losses: Tensor, scale: float) -> Tensor:
    """Take the -1 of unlikely targets out of `gradient` (n, V); returns 1 where that was done, else 0; fp32 (n,).

    The entries softmax - 1 are by far the largest, and rounding them and their products to bf16, chunk by chunk, would
    put the sum further from the truth than one product over all tokens is (measured: 2.4e-3 against 1.7e-3; so it is
    1.7e-3). Where the softmax is 1/2 or more, softmax - 1 is the smaller number and stays.
    """
    likelihoods = losses.neg().exp()
    ones = (likelihoods < 0.5).float()
    # Assigned by index: `scatter_` would go through an fp32 copy of all of `gradient`.
    rows = torch.arange(targets.numel(), device=targets.device)
    gradient[rows, targets] = ((likelihoods + ones - 1) * scale).to(gradient.dtype)
    return ones
