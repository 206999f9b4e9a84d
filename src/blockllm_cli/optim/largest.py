"""The largest entries or rows of a gradient, exactly, with ties to the lower position."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_SLICE = 2**20
"""Entries that are looked at at a time."""


def largest_entries(gradient: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes, int64, ascending; ties go to the lower position.

    Args:
        gradient: any shape and float dtype of 16 bits or more; not modified. NaN counts as larger than infinity, so
            that what is kept of a gradient that is not finite is not finite either, which the kept norm shows.
        count: 0 to the number of entries.
    """
    return _largest(gradient.reshape(-1), count)


def largest_rows(gradient: Tensor, count: int) -> Tensor:
    """Indices of the `count` rows with the largest Euclidean norm (fp32), int64, ascending; ties as above."""
    rows = gradient.reshape(gradient.shape[0], -1)
    return _largest(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32), count)


def _largest(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest magnitudes of a 1-D tensor; memory is bounded by a slice and the result."""
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=values.device)
    threshold, ties = _threshold(values, count)
    chosen = []
    for start, keys in _keys(values):
        taken = keys > threshold
        equal = (keys == threshold).nonzero().view(-1)[:ties]
        taken[equal] = True
        ties -= equal.numel()
        chosen.append(taken.nonzero().view(-1) + start)
    return torch.cat(chosen)


def _threshold(values: Tensor, count: int) -> tuple[int, int]:
    """The `count`-th largest key, and how many of the keys equal to it are among the `count` largest.

    A radix selection: the key is found 16 bits at a time by counting how often each value of these bits occurs among
    the keys that agree with what was found before. Counts are exact, so the result is the same on every device.
    """
    highest = 8 * values.element_size() - 16
    found = 0
    for shift in range(highest, -1, -16):
        times = torch.zeros(2**16, dtype=torch.int64, device=values.device)
        for _, keys in _keys(values):
            digits = keys >> shift
            if shift != highest:
                digits = digits[keys >> (shift + 16) == found].bitwise_and_(2**16 - 1)
            times += torch.bincount(digits, minlength=2**16)
        at_least = times.flip(0).cumsum(0).flip(0)
        digit = int((at_least >= count).count_nonzero()) - 1
        count -= int(at_least[digit] - times[digit])
        found = found << 16 | digit
    return found, count


def _keys(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(first position, whole numbers in the order of the magnitudes) of consecutive slices: the bits without sign."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    for start in range(0, values.numel(), _SLICE):
        yield start, values[start : start + _SLICE].abs().view(whole)
